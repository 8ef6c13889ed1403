use super::*;

const MIB: u64 = 1 << 20;
const LINE: Line = Line::mbit(100, 100);

fn equal(n: usize, mib: u64) -> Plan {
    Plan::star(mib * MIB, LINE, vec![LINE; n], 7)
}

#[test]
fn probe() {
    for n in [1usize, 2, 4, 8, 16] {
        let plan = equal(n, 32);
        let bound = plan.bound(0).as_secs_f64();
        let report = World::new(plan).run(Duration::from_secs(60));
        println!(
            "{n} {:?} {:.3} {:?}",
            report.last(1..=n).map(|t| t.as_secs_f64() / bound),
            report.sent[0] as f64 / (32.0 * MIB as f64),
            report.shared[0]
        );
    }
}
