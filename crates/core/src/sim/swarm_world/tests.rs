use super::*;

const MIB: u64 = 1 << 20;

#[test]
fn probe() {
    for n in [1usize, 2, 4, 8, 16] {
        let line = Line::mbit(100, 100);
        let start = std::time::Instant::now();
        let plan = Plan::star(32 * MIB, line, vec![line; n], 1);
        let bound = plan.bound(0);
        let report = World::new(plan).run(Duration::from_secs(120));
        let t = report.last(1..=n);
        println!(
            "N={n} T/T*={:?} copies={:.3} dup={} events={} real={:?} dropped={:?}",
            t.map(|t| t.as_secs_f64() / bound.as_secs_f64()),
            report.sent[0] as f64 / (32.0 * MIB as f64),
            report.duplicate.iter().sum::<u64>() / 65536,
            report.events,
            start.elapsed(),
            report.dropped.len()
        );
    }
}
