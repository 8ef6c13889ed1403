//! Owns the lab's network: a switch, and hosts on it whose links are as slow as was asked for. Each
//! host is a network namespace. Never knows what the hosts do.
//!
//! A host's sending is shaped at its own end of its cable and its receiving at the switch's end, so
//! that neither takes from the other, and what stands in a queue stands where it would outside.

use std::fs;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::proc::output;

/// What a queue in front of a shaped link may hold, as time at its rate …
const QUEUE_S: f64 = 0.020;
/// … but at least so much: sixteen senders to one receiver have to fit, or they drive each other
/// into timeouts.
const QUEUE_BYTES: f64 = 192.0 * 1024.0;
/// What a shaper may let go at once, as time at its rate, and at least.
const BURST_S: f64 = 0.002;
const BURST_BYTES: f64 = 16.0 * 1024.0;
/// What hosts use, whatever this machine does: it is what most machines have. It is said of the route
/// because a namespace may not choose what the machine does not allow everyone.
const CONGESTION_CONTROL: &str = "cubic";

/// The switch's own address: what runs outside of all hosts is reached by it.
pub(crate) const SWITCH: Ipv4Addr = Ipv4Addr::new(10, 77, 255, 254);

/// Mbit/s (10⁶ bits of packets) in each direction; 0: as fast as this machine can.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Link {
    pub(crate) up: f64,
    pub(crate) down: f64,
}

/// What happens to packets on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Weather {
    /// This share of them is lost.
    pub(crate) loss: f64,
    /// Each waits so long where it is sent, so that a round trip takes twice this.
    pub(crate) delay_ms: f64,
}

/// Bytes on a host's cable so far, in packets as its kernel hands them over (a few in one).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Traffic {
    pub(crate) sent: u64,
    pub(crate) received: u64,
}

/// A switch and its hosts. They are gone when this is dropped; and they are inside the lab's own
/// namespaces, so that they are gone as well however the lab ends.
pub(crate) struct Net {
    weather: Weather,
    hosts: usize,
}

impl Net {
    pub(crate) fn build(links: &[Link], weather: Weather) -> Result<Self> {
        let net = Self { weather, hosts: links.len() };
        ip(
            &format!(
                "link add switch address {} type bridge stp_state 0 forward_delay 0\n\
                 link set switch up\n\
                 addr add {SWITCH}/16 dev switch\n",
                hardware(SWITCH)
            ),
            None,
        )?;
        for table in ["iptables", "ip6tables", "arptables"] {
            // Nobody filters here, and looking costs CPU. Where there is no such switch, nobody looks.
            let _ = fs::write(format!("/proc/sys/net/bridge/bridge-nf-call-{table}"), "0");
        }
        for (host, link) in links.iter().enumerate() {
            net.add(host, *link)?;
        }
        if weather.loss > 0.0 {
            // By packet where packets are told apart: see `add`.
            let drop = (weather.loss * 1e6) as u32;
            let rules = format!(
                "table bridge lab {{\n\
                 chain way {{\n\
                 type filter hook forward priority 0;\n\
                 ip protocol tcp numgen random mod 1000000 < {drop} drop\n\
                 }}\n\
                 }}\n"
            );
            feed(Command::new("nft").arg("-f").arg("-"), &rules)?;
        }
        Ok(net)
    }

    fn add(&self, host: usize, link: Link) -> Result<()> {
        let (name, port) = (namespace(host), port(host));
        ip(
            &format!(
                "netns add {name}\n\
                 link add {port} mtu 1500 type veth peer name eth0 mtu 1500 netns {name}\n\
                 link set {port} master switch up\n"
            ),
            None,
        )?;
        let mut inside = format!(
            "link set lo up\n\
             link set eth0 address {} up\n\
             addr add {}/16 dev eth0\n\
             route replace 10.77.0.0/16 dev eth0 src {} congctl {CONGESTION_CONTROL}\n",
            hardware(address(host)),
            address(host),
            address(host),
        );
        // Without these a queue that is full drops the question who an address is, and connecting
        // fails at once.
        let know =
            |ip, dev| format!("neigh add {ip} lladdr {} nud permanent dev {dev}\n", hardware(ip));
        let others = (0..self.hosts).filter(|other| *other != host).map(address);
        inside.extend(others.chain([SWITCH]).map(|ip| know(ip, "eth0")));
        ip(&know(address(host), "switch"), None)?;
        if self.weather != Weather::default() {
            // A packet each on the wire, or chance would take 64 KiB at once.
            inside += "link set eth0 gso_max_segs 1\n";
        }
        ip(&inside, Some(&name))?;
        self.shape(host, link.up)?;
        if link.down > 0.0 {
            tc(&format!("qdisc add dev {port} root {}", bucket(link.down)), None)?;
        }
        Ok(())
    }

    /// Changes how fast a host may send.
    pub(crate) fn shape(&self, host: usize, up: f64) -> Result<()> {
        let inside = namespace(host);
        let delay = self.weather.delay_ms;
        let above = if delay > 0.0 { "parent 1:1" } else { "root" };
        if delay > 0.0 {
            let wait = format!("qdisc replace dev eth0 root handle 1: netem delay {delay}ms");
            tc(&format!("{wait} limit 100000"), Some(&inside))
                .context("this kernel cannot delay packets (CONFIG_NET_SCH_NETEM)")?;
        }
        if up > 0.0 {
            tc(&format!("qdisc replace dev eth0 {above} {}", bucket(up)), Some(&inside))?;
        }
        Ok(())
    }

    /// What went over every host's cable so far.
    pub(crate) fn traffic(&self) -> Result<Vec<Traffic>> {
        let text = fs::read_to_string("/proc/thread-self/net/dev")?;
        let mut all = vec![Traffic::default(); self.hosts];
        for line in text.lines() {
            let Some((name, counts)) = line.split_once(':') else { continue };
            let Some(host) = name.trim().strip_prefix("port").and_then(|n| n.parse().ok()) else {
                continue;
            };
            let counts: Vec<u64> = counts.split_whitespace().flat_map(str::parse).collect();
            ensure!(counts.len() == 16, "/proc/net/dev says {line:?}");
            let host: &mut Traffic = all.get_mut::<usize>(host).context("a port too many")?;
            // What the switch receives is what the host has sent.
            *host = Traffic { sent: counts[0], received: counts[8] };
        }
        Ok(all)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for host in 0..self.hosts {
            let _ = ip(&format!("link del {}\nnetns del {}\n", port(host), namespace(host)), None);
        }
        let _ = ip("link del switch\n", None);
        if self.weather.loss > 0.0 {
            let _ = output(Command::new("nft").args(["delete", "table", "bridge", "lab"]));
        }
    }
}

/// The name of a host's namespace.
pub(crate) fn namespace(host: usize) -> String {
    format!("host{host}")
}

/// A host's address.
pub(crate) fn address(host: usize) -> Ipv4Addr {
    let nth = host as u16 + 1;
    Ipv4Addr::new(10, 77, (nth >> 8) as u8, nth as u8)
}

fn hardware(address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
    format!("02:00:{a:02x}:{b:02x}:{c:02x}:{d:02x}")
}

fn port(host: usize) -> String {
    format!("port{host}")
}

fn bucket(mbit: f64) -> String {
    let bytes_s = mbit * 1e6 / 8.0;
    let burst = (bytes_s * BURST_S).max(BURST_BYTES);
    let limit = (bytes_s * QUEUE_S).max(QUEUE_BYTES) + burst;
    format!("tbf rate {:.0}bit burst {burst:.0} limit {limit:.0}", mbit * 1e6)
}

fn ip(batch: &str, inside: Option<&str>) -> Result<()> {
    let mut command = Command::new("ip");
    command.args(inside.iter().flat_map(|name| ["-n", name])).args(["-batch", "-"]);
    feed(&mut command, batch)
}

fn tc(line: &str, inside: Option<&str>) -> Result<()> {
    let mut command = Command::new("tc");
    command.args(inside.iter().flat_map(|name| ["-n", name])).args(line.split(' '));
    output(&mut command).map(drop)
}

/// Runs a command with `text` as its stdin.
fn feed(command: &mut Command, text: &str) -> Result<()> {
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {command:?}"))?;
    // Dropped, and so ended, before it is waited for.
    child.stdin.take().context("it has no stdin")?.write_all(text.as_bytes())?;
    let done = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "{command:?} failed: {said}\nIt was told:\n{text}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shaper_lets_two_milliseconds_go_at_once_and_queues_at_least_192_kib() {
        assert_eq!(bucket(100.0), "tbf rate 100000000bit burst 25000 limit 275000");
        assert_eq!(bucket(2.0), "tbf rate 2000000bit burst 16384 limit 212992");
    }

    #[test]
    fn hosts_have_addresses_of_their_own_beyond_a_byte() {
        assert_eq!(address(0), Ipv4Addr::new(10, 77, 0, 1));
        assert_eq!(address(299), Ipv4Addr::new(10, 77, 1, 44));
        assert_eq!(hardware(address(299)), "02:00:0a:4d:01:2c");
    }
}
