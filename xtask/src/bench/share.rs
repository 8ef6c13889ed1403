//! Owns the measurement of sharing: hash, proofs, and the index's word that it is registered.

use std::fs;
use std::process::Command;

use anyhow::{Result, bail, ensure};
use potluck::control::Event;

use super::{Runs, Setting, make_up};
use crate::proc::{self, Machine, measure};
use crate::table::Table;

pub(super) fn run(setting: &Setting) -> Result<()> {
    let (potluck, dir) = (&setting.potluck, &setting.dir);
    let (_index, invite) = Machine::index(potluck, dir, None)?;
    let peer = Machine::peer(potluck, dir, "peer", &invite)?;
    let mut file = peer.home.join("file");
    let hash = make_up(&file, setting.size)?.to_string();
    let b3sum = proc::find("b3sum");
    let (mut ours, mut theirs) = (Runs::default(), Runs::default());
    for nth in 0..setting.runs {
        // A path that was never shared: nothing is remembered of it.
        let fresh = peer.home.join(format!("file-{nth}"));
        fs::rename(&file, &fresh)?;
        file = fresh;
        let (shared, cost) = measure(&[peer.pid()], || peer.asks([&"share".into(), &file]))?;
        let Event::Shared { id, .. } = shared else { bail!("share said {shared:?}") };
        ensure!(id == hash, "potluck share found another hash");
        ours.0.push(cost);
        peer.asks(["unshare", &id])?;
        if let Some(b3sum) = &b3sum {
            let mut command = Command::new(b3sum);
            let (text, cost) = measure(&[], || proc::output(command.arg("--no-names").arg(&file)))?;
            ensure!(text.trim() == hash, "b3sum found another hash");
            theirs.0.push(cost);
        }
    }
    println!("## Share: one file of {} MiB, in page cache\n", setting.size >> 20);
    let mut table = Table::new(&["", "s", "MB/s", "CPU s", "× b3sum", "others busy"]);
    for (name, runs) in [("potluck share", &ours), ("b3sum", &theirs)] {
        if runs.0.is_empty() {
            table.row([name.to_owned(), "not installed".to_owned()]);
            continue;
        }
        table.row([
            name.to_owned(),
            format!("{:.3}", runs.seconds()),
            format!("{:.0}", runs.rate(setting.size)),
            format!("{:.2}", runs.median(|cost| cost.cpu.iter().sum::<f64>() + cost.children)),
            format!("{:.2}", theirs.seconds() / runs.seconds()),
            runs.others(),
        ]);
    }
    println!("{table}\nPeak RSS of the peer: {:.0} MiB.\n", proc::memory(peer.pid(), "VmHWM")?);
    Ok(())
}
