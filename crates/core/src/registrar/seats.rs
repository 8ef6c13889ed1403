//! Owns what the index knows of a member since it started: its sessions and their replay windows, its pace,
//! and until when what it hosts stays. Never knows what that is: the catalog does.

use std::net::SocketAddr;

use crate::id::MemberNumber;
use crate::seal::{CookieJar, ReplayWindow};
use crate::time::{Duration, Moment};

use super::gate::{Line, Opened};
use super::pace::Pace;
use super::{Dropped, Output, Registrar, saved};

/// Heartbeats that a member may miss before what it hosts is forgotten.
const LEASE_HEARTBEATS: u64 = 3;

/// What the index keeps of a member's session; made only when a datagram proved to be its own.
///
/// A window that is dropped while replays could still open is no danger: without a cookie of the
/// last two minutes they have no effect, and windows used within four minutes go last.
pub(super) struct Session {
    pub(super) epoch: u16,
    pub(super) salt: u64,
    pub(super) window: ReplayWindow,
    pub(super) used: Moment,
    /// How many sessions this member had before.
    pub(super) nth: u64,
}

/// What the index knows of a member since it started.
#[derive(Default)]
pub(super) struct Seat {
    pub(super) sessions: Vec<Session>,
    /// Sessions it ever had.
    pub(super) born: u64,
    /// Session and counter of the last datagram that changed what it hosts, and of the last that
    /// changed what it watches: changes are made in the order in which it sent them, or an old one,
    /// late, would undo a newer.
    pub(super) hosts_order: (u64, u64),
    pub(super) watch_order: (u64, u64),
    pub(super) pace: Pace,
    pub(super) heard: Option<Moment>,
    /// When it last said how busy it is, not counting what came sooner than it had to.
    pub(super) reported: Option<Moment>,
    /// Until when what it hosts stays; `None` while it hosts nothing.
    pub(super) lease: Option<Moment>,
    /// Since the restart it has not said how much it holds of what it does not hold whole: that is
    /// not saved, and no part of the digest.
    pub(super) vague: bool,
    /// It stands in the queue of leases.
    pub(super) queued: bool,
    /// The address in the saved rows.
    pub(super) saved: Option<SocketAddr>,
}

impl Registrar {
    /// Notes a member's datagram in its session; where it stands among all it sent, or why it is
    /// dropped. What was opened with keys of a moment ago may be out of date by now.
    pub(super) fn recognise(
        &mut self,
        now: Moment,
        opened: &Opened<'_>,
    ) -> Result<(u64, u64), Dropped> {
        let Line { member, epoch, salt, .. } = opened.line;
        if !self.epochs.knows(epoch) {
            return Err(Dropped::UnknownEpoch);
        }
        let most = self.settings.sessions_a_member;
        let seat = self.seat(member);
        let known = seat.sessions.iter_mut().find(|s| (s.epoch, s.salt) == (epoch, salt));
        if let Some(session) = known {
            if !session.window.mark(opened.counter) {
                return Err(Dropped::Replayed);
            }
            session.used = now;
            return Ok((session.nth, opened.counter));
        }
        let mut window = ReplayWindow::default();
        window.mark(opened.counter);
        seat.born += 1;
        let nth = seat.born;
        let before = seat.sessions.len();
        seat.remember(Session { epoch, salt, window, used: now, nth }, now, most);
        let after = seat.sessions.len();
        self.sessions = self.sessions + after - before;
        Ok((nth, opened.counter))
    }

    pub(super) fn seat(&mut self, member: MemberNumber) -> &mut Seat {
        let at = member.0 as usize;
        if self.seats.len() <= at {
            self.seats.resize_with(at + 1, || None);
        }
        self.seats[at].get_or_insert_with(Box::default)
    }

    pub(super) fn lease(&self) -> Duration {
        Duration::from_secs(u64::from(self.settings.heartbeat_s.max(1)) * LEASE_HEARTBEATS)
    }

    /// A member's lease holds until `until`, if it hosts anything.
    pub(super) fn renew(&mut self, member: MemberNumber, until: Moment) {
        if self.catalog.hosted_by(member) == 0 {
            return;
        }
        let seat = self.seat(member);
        seat.lease = Some(until);
        // A renewed lease is not moved in the queue but looked at again when its turn comes.
        if !std::mem::replace(&mut seat.queued, true) {
            self.leases.insert((until, member));
        }
    }

    pub(super) fn grant_leases(&mut self, now: Moment) {
        let until = now + self.lease();
        let members: Vec<MemberNumber> = self.roster.present().map(|m| m.number).collect();
        for member in members {
            let address = self.catalog.address_of(member);
            if address.is_some() {
                self.seat(member).saved = address;
            }
            self.renew(member, until);
            self.settle(member);
        }
    }

    /// Forgets what members host whose lease is over.
    pub(super) fn lapse(&mut self, now: Moment) {
        while let Some(&(moment, member)) = self.leases.first() {
            if moment > now {
                break;
            }
            self.leases.pop_first();
            let seat = self.seat(member);
            seat.queued = false;
            match seat.lease {
                Some(until) if until > now => {
                    seat.queued = true;
                    self.leases.insert((until, member));
                }
                Some(_) => {
                    self.stats.lapsed += 1;
                    self.evict(member);
                }
                None => {}
            }
        }
        self.watchers.note(now, self.catalog.sequence());
    }

    /// Forgets what a member hosts.
    pub(super) fn evict(&mut self, member: MemberNumber) {
        self.catalog.evict(member);
        self.settle(member);
    }

    /// After a member's registrations may have changed: what must outlive a restart is saved, and a
    /// lease on nothing ends.
    pub(super) fn settle(&mut self, member: MemberNumber) {
        while let Some(durable) = self.catalog.poll_journal() {
            self.outputs.push_back(Output::Save(saved::durable(durable)));
        }
        let hosts = self.catalog.hosted_by(member) > 0;
        let address = self.catalog.address_of(member).filter(|_| hosts);
        let seat = self.seat(member);
        if !hosts {
            seat.lease = None;
        }
        if seat.saved != address {
            seat.saved = address;
            self.outputs.push_back(Output::Save(saved::address(member, address)));
        }
    }
}

impl Seat {
    /// Keeps a new session; for it goes one that was not used for long, or the one unused longest.
    fn remember(&mut self, session: Session, now: Moment, most: usize) {
        self.sessions.retain(|old| now.since(old.used) <= 2 * CookieJar::LIFE);
        if self.sessions.len() >= most.max(1)
            && let Some(oldest) = (0..self.sessions.len()).min_by_key(|at| self.sessions[*at].used)
        {
            self.sessions.swap_remove(oldest);
        }
        self.sessions.push(session);
    }
}
