//! Owns how much a socket takes beyond what is on its way (`TCP_NOTSENT_LOWAT`): as much as goes out
//! while a thread wakes up, and no more. What lies there can be neither taken back nor overtaken, and
//! a socket left alone takes megabytes: at a slow link, seconds.

use std::net::TcpStream;

use potluck_core::time::{Duration, Moment};

/// As much goes out in this time …
const AHEAD: Duration = Duration::from_millis(10);
/// … but no less than this (the simulator's swarms hold as much), …
const LEAST: u32 = 32 << 10;
/// … and no more than the kernel lets a socket have anyway.
const MOST: u32 = 4 << 20;
/// The rate is measured over this time; a longer silence begins anew.
const SAMPLE: Duration = Duration::from_millis(50);

/// What a socket is allowed.
pub(super) struct Unsent {
    allowed: u32,
    since: Moment,
    last: Moment,
    bytes: u64,
}

impl Unsent {
    /// Before anything is known of the link.
    pub(super) fn new(socket: &TcpStream, now: Moment) -> Self {
        allow(socket, LEAST);
        Self { allowed: LEAST, since: now, last: now, bytes: 0 }
    }

    /// The socket took so many bytes.
    pub(super) fn took(&mut self, socket: &TcpStream, now: Moment, bytes: usize) {
        if let Some(allowed) = self.add(now, bytes) {
            allow(socket, allowed);
        }
    }

    /// What it is to be allowed from now on, where that changes.
    fn add(&mut self, now: Moment, bytes: usize) -> Option<u32> {
        if now.since(self.last) >= SAMPLE {
            (self.since, self.bytes) = (self.last.max(now - SAMPLE), 0);
        }
        self.last = now;
        self.bytes += bytes as u64;
        let time = now.since(self.since);
        if time < SAMPLE {
            return None;
        }
        let ahead = u128::from(self.bytes) * AHEAD.as_micros() / time.as_micros();
        (self.since, self.bytes) = (now, 0);
        let allowed = u32::try_from(ahead).unwrap_or(MOST).clamp(LEAST, MOST).next_power_of_two();
        // Down only by half or more: a rate near a power of two would go to and fro.
        let changes = allowed > self.allowed || allowed < self.allowed / 2;
        changes.then(|| {
            self.allowed = allowed;
            allowed
        })
    }
}

fn allow(socket: &TcpStream, bytes: u32) {
    // Where that cannot be, pieces are only decided on earlier than they need be.
    let _ = socket2::SockRef::from(socket).set_tcp_notsent_lowat(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends at this rate for two seconds, in writes of so many bytes; what is allowed then.
    fn after(unsent: &mut Unsent, bytes_s: usize, write: usize) -> u32 {
        let every = Duration::from_micros((write * 1_000_000 / bytes_s) as u64);
        let end = unsent.last + Duration::from_secs(2);
        let mut now = unsent.last;
        while now < end {
            now = now + every;
            unsent.add(now, write);
        }
        unsent.allowed
    }

    #[test]
    fn a_socket_holds_what_goes_out_in_the_time_it_takes_to_wake_up() {
        let start = Moment::from_micros(7);
        let mut unsent = Unsent { allowed: LEAST, since: start, last: start, bytes: 0 };
        assert_eq!(after(&mut unsent, 600_000, 4_000), LEAST);
        assert_eq!(after(&mut unsent, 125_000_000, 100_000), 2 << 20);
        assert_eq!(after(&mut unsent, 1_500_000_000, 300_000), MOST);
        assert_eq!(after(&mut unsent, 12_500_000, 10_000), 128 << 10);
        // After a rest it is measured anew.
        unsent.last = unsent.last + Duration::from_secs(60);
        assert_eq!(after(&mut unsent, 125_000_000, 100_000), 2 << 20);
        assert_eq!(after(&mut unsent, 100_000, 1_000), LEAST);
    }
}
