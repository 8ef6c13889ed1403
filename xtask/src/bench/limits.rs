//! Owns the measurement of limits: how near a transfer stays to what a peer was told to send or
//! receive.

use std::fs;

use anyhow::{Result, bail, ensure};
use potluck::control::Event;

use super::{Setting, check, make_up};
use crate::proc::{Machine, measure};
use crate::table::{Table, median};

/// The limits, in bytes a second.
const RATES: [u64; 4] = [1_000_000, 12_500_000, 50_000_000, 150_000_000];
/// A transfer under a limit takes so long.
const SECONDS: u64 = 4;
/// What the limit may be missed by.
const TOLERANCE: f64 = 0.03;

pub(super) fn run(setting: &Setting) -> Result<()> {
    let (potluck, dir) = (&setting.potluck, &setting.dir);
    let (_index, invite) = Machine::index(potluck, dir, None)?;
    let source = Machine::peer(potluck, dir, "source", &invite)?;
    let fetcher = Machine::peer(potluck, dir, "fetcher", &invite)?;
    println!("## Limits: one source, one fetcher, {SECONDS} s each over loopback\n");
    let heads = ["limit MB/s", "of the source's sending", "of the fetcher's receiving", "holds"];
    let mut table = Table::new(&heads);
    for rate in RATES {
        let file = source.home.join(format!("file-{rate}"));
        let hash = make_up(&file, rate * SECONDS)?;
        let shared = source.asks([&"share".into(), &file])?;
        let Event::Shared { id, .. } = shared else { bail!("share said {shared:?}") };
        let mut shares = [0.0; 2];
        for (share, (who, way)) in shares.iter_mut().zip([(&source, "--up"), (&fetcher, "--down")])
        {
            who.asks(["limit", way, &rate.to_string()])?;
            let mut runs = vec![];
            for _ in 0..setting.runs {
                let copy = fetcher.home.join("copy");
                let get = ["get".as_ref(), id.as_ref(), "--output".as_ref(), copy.as_os_str()];
                let (done, cost) = measure(&[], || fetcher.asks(get))?;
                ensure!(matches!(done, Event::Done { .. }), "get said {done:?}");
                check(&copy, hash)?;
                fetcher.asks(["unshare", &id])?;
                fs::remove_file(&copy)?;
                runs.push(SECONDS as f64 / cost.seconds);
            }
            who.asks(["limit", way, "off"])?;
            *share = median(runs);
        }
        let holds = shares.iter().all(|share| (share - 1.0).abs() <= TOLERANCE);
        table.row([
            format!("{:.1}", rate as f64 / 1e6),
            format!("{:.3}", shares[0]),
            format!("{:.3}", shares[1]),
            if holds { "yes" } else { "no" }.to_owned(),
        ]);
        source.asks(["unshare", &id])?;
        fs::remove_file(&file)?;
    }
    println!("In times of the limit, bytes of the file over the whole time of `potluck get`.\n");
    println!("{table}");
    Ok(())
}
