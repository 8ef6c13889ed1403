//! Owns sendme (iroh): QUIC, encrypted, verified by BLAKE3.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::{Host, Tool, missing_of};
use crate::proc::Running;

#[derive(Default)]
pub(crate) struct Sendme {
    ticket: String,
}

/// Addresses alone: nobody outside is asked or told anything.
const ALONE: [&str; 4] = ["--no-progress", "--relay", "disabled", "--magic-ipv4-addr"];

impl Tool for Sendme {
    fn name(&self) -> &'static str {
        "sendme"
    }

    fn missing(&self) -> Option<&'static str> {
        missing_of(&["sendme"])
    }

    fn serve(&mut self, at: &Host, what: &Path) -> Result<Running> {
        let mut send = at.command("sendme")?;
        send.arg("send").args(ALONE).arg(at.address().to_string());
        send.args(["--ticket-type", "addresses"]).arg(what);
        let mut source = at.start(&mut send)?;
        let ticket = |log: &str| {
            let words = log.split_whitespace().map(str::to_owned);
            words.into_iter().find(|word| word.starts_with("blob") && word.len() > 30)
        };
        at.wait_until(&mut source, || Ok(ticket(&at.log()).is_some()))?;
        self.ticket = ticket(&at.log()).context("it was just there")?;
        Ok(source)
    }

    fn fetch(&self, at: &Host, into: &Path, _: Option<&Path>) -> Result<Command> {
        let mut receive = at.command("sendme")?;
        receive.arg("receive").args(ALONE).arg(at.address().to_string()).arg(&self.ticket);
        receive.current_dir(into);
        Ok(receive)
    }
}
