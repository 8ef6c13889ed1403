//! Owns a BitTorrent tracker, small enough for a lab: it tells every peer of all others. One torrent,
//! compact answers, nobody is ever forgotten.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::Result;

/// How often peers ask again, in seconds.
const INTERVAL_S: u32 = 10;

/// Peers by their addresses.
type Peers = Arc<Mutex<BTreeSet<SocketAddr>>>;

/// A tracker that runs until this process ends.
pub(crate) struct Tracker {
    peers: Peers,
}

impl Tracker {
    pub(crate) fn start(at: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(at)?;
        let peers = Peers::default();
        let tracker = Self { peers: Arc::clone(&peers) };
        thread::spawn(move || {
            for stream in listener.incoming().filter_map(Result::ok) {
                // A peer that breaks off asks again.
                let _ = answer(&stream, &peers);
            }
        });
        Ok(tracker)
    }

    /// How many peers it has heard of.
    pub(crate) fn peers(&self) -> usize {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Forgets them all: another torrent.
    pub(crate) fn forget(&self) {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

fn answer(mut stream: &TcpStream, peers: &Peers) -> Result<()> {
    let mut lines = BufReader::new(stream).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    let from = stream.peer_addr()?.ip();
    let mut all = peers.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(port) = port_in(&request) {
        all.insert(SocketAddr::new(from, port));
    }
    let body = compact(&all, from);
    drop(all);
    write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len())?;
    stream.write_all(&body)?;
    Ok(())
}

/// The port that a peer says it listens on: `GET /announce?…&port=6881&… HTTP/1.1`.
fn port_in(request: &str) -> Option<u16> {
    let (_, query) = request.split(' ').nth(1)?.split_once('?')?;
    query.split('&').find_map(|pair| pair.strip_prefix("port="))?.parse().ok()
}

/// All but the asker, as BEP 23 packs them.
fn compact(peers: &BTreeSet<SocketAddr>, asker: IpAddr) -> Vec<u8> {
    let others = peers.iter().filter(|peer| peer.ip() != asker);
    let packed: Vec<u8> = others
        .filter_map(|peer| match peer.ip() {
            IpAddr::V4(ip) => Some([&ip.octets()[..], &peer.port().to_be_bytes()].concat()),
            IpAddr::V6(_) => None,
        })
        .flatten()
        .collect();
    let head = format!("d8:intervali{INTERVAL_S}e5:peers{}:", packed.len());
    [head.as_bytes(), &packed, b"e"].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_told_of_all_others() {
        let peers = ["10.0.0.1:6881", "10.0.0.2:258"].map(|peer| peer.parse().unwrap());
        let told = compact(&peers.into(), "10.0.0.1".parse().unwrap());
        assert_eq!(told, b"d8:intervali10e5:peers6:\x0a\0\0\x02\x01\x02e");
        let request = "GET /announce?info_hash=%00port=1&peer_id=x&port=6881&left=0 HTTP/1.1";
        assert_eq!(port_in(request), Some(6881));
        assert_eq!(port_in("GET / HTTP/1.1"), None);
    }
}
