//! Owns the measurement of aquatic_udp, the fastest open BitTorrent tracker: announces of BEP 15, which
//! are neither encrypted nor authenticated, with as many peers of as many torrents as the index has.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::storm::{self, Batches, Requests, Storm, Waits};
use crate::proc::{self, Running};

/// The magic number of a connect request.
const PROTOCOL: u64 = 0x0417_2710_1980;
const CONNECT: u32 = 0;
const ANNOUNCE: u32 = 1;
/// Tries to reach it while it starts.
const TRIES: u32 = 50;

pub(super) struct Tracker {
    process: Running,
    address: SocketAddr,
    torrents: u32,
    peers: u32,
}

impl Tracker {
    /// Starts one on a core of its own and announces all peers; `None` where it is not installed.
    pub(super) fn start(
        dir: &Path,
        core: usize,
        torrents: u32,
        peers: u32,
    ) -> Result<Option<Self>> {
        let Some(program) = proc::find("aquatic_udp") else { return Ok(None) };
        let address = UdpSocket::bind("127.0.0.1:0")?.local_addr()?;
        let config = dir.join("aquatic.toml");
        let minutes = "torrent_cleaning_interval = 3600\nmax_connection_age = 3600";
        fs::write(
            &config,
            format!(
                "socket_workers = 1\n[network]\naddress = \"{address}\"\n[cleaning]\n{minutes}\n"
            ),
        )?;
        let mut command = proc::on_core(Some(core), &program);
        command.arg("-c").arg(&config);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = Running(command.spawn().context("cannot run aquatic_udp")?);
        let tracker = Self { process, address, torrents, peers };
        let all = torrents * peers;
        let mut batches = tracker.connect()?;
        let requests = tracker.announces(&batches.1, 0..all, |nth| (nth / peers, nth % peers));
        let done = storm::storm(tracker.process.pid(), &mut batches.0, &requests, |d| judge(d))?;
        ensure!(done.lost == 0, "aquatic_udp lost {} announces", done.lost);
        Ok(Some(tracker))
    }

    /// As many announces as are answered, and then half as many.
    pub(super) fn run(&mut self, most: usize, steady: usize, dice: u64) -> Result<(Storm, Waits)> {
        let (mut batches, id) = self.connect()?;
        let mut stream = blake3::Hasher::new().update(&dice.to_be_bytes()).finalize_xof();
        let (torrents, peers) = (self.torrents, self.peers);
        let mut drawn = |_| {
            let mut bytes = [0; 8];
            stream.fill(&mut bytes);
            let draw = u64::from_be_bytes(bytes);
            ((draw >> 32) as u32 % torrents, draw as u32 % peers)
        };
        let requests = self.announces(&id, 0..most as u32, &mut drawn);
        let storm = storm::storm(self.process.pid(), &mut batches, &requests, |d| judge(d))?;
        let requests = self.announces(&id, 0..steady as u32, &mut drawn);
        let waits = storm::pace(&mut batches, &requests, storm.rate() / 2.0, |d| judge(d))?;
        Ok((storm, waits))
    }

    fn connect(&self) -> Result<(Batches, [u8; 8])> {
        let batches = Batches::to(self.address)?;
        let mut request = PROTOCOL.to_be_bytes().to_vec();
        request.extend_from_slice(&CONNECT.to_be_bytes());
        request.extend_from_slice(&7u32.to_be_bytes());
        for _ in 0..TRIES {
            // While it starts the kernel may answer that nobody listens.
            let mut buffer = [0; 64];
            if batches.socket.send(&request).is_ok()
                && let Ok(Some(16)) = batches.take_one(&mut buffer)
                && let Some(id) = buffer[8..].first_chunk()
            {
                return Ok((batches, *id));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("aquatic_udp does not answer")
    }

    /// Announces of peers of torrents, ten peers wanted; each peer is a port of ours.
    fn announces(
        &self,
        connection: &[u8; 8],
        range: std::ops::Range<u32>,
        mut which: impl FnMut(u32) -> (u32, u32),
    ) -> Requests {
        let mut all = Requests::default();
        for nth in range {
            let (torrent, peer) = which(nth);
            let mut bytes = connection.to_vec();
            bytes.extend_from_slice(&ANNOUNCE.to_be_bytes());
            bytes.extend_from_slice(&nth.to_be_bytes());
            bytes.extend_from_slice(&blake3::hash(&torrent.to_be_bytes()).as_bytes()[..20]);
            let mut id = [b'-'; 20];
            id[16..].copy_from_slice(&peer.to_be_bytes());
            bytes.extend_from_slice(&id);
            // Downloaded, left, uploaded; event, address, key; peers wanted, port.
            [0u64, 1, 0].iter().for_each(|n| bytes.extend_from_slice(&n.to_be_bytes()));
            [0u32, 0, 0, self.peers].iter().for_each(|n| bytes.extend_from_slice(&n.to_be_bytes()));
            bytes.extend_from_slice(&(10_000 + peer as u16).to_be_bytes());
            all.push(&bytes);
        }
        all
    }
}

/// Which announce a reply answers.
fn judge(datagram: &[u8]) -> Result<usize> {
    let words = datagram.as_chunks::<4>().0;
    ensure!(words.len() >= 5 && words[0] == ANNOUNCE.to_be_bytes(), "aquatic_udp refused");
    Ok(u32::from_be_bytes(words[1]) as usize)
}
