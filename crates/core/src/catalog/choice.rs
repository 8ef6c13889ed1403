//! Owns which hosts a search is answered with. Never excludes a host for being busy: it only
//! prefers others.
//!
//! Two random choices (Mitzenmacher 2001): of two hosts drawn blindly the less strained is taken.
//! Always taking the least strained would send everybody to the same few.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::dice::Dice;
use crate::id::{MemberNumber, PeerId};
use crate::wire::datagram::{Code, Found, Host, Load, Refusal, Search};

use super::{Catalog, Hosting, Slot, refuse};

/// What fetchers are told of a host, and how strained it is as far as the index knows. One cache line:
/// an answer needs those of all hosts in it.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(super) struct Card {
    pub(super) peer: PeerId,
    /// IPv4 addresses as IPv6 ones.
    ip: [u8; 16],
    port: u16,
    /// Thousandths of its capacity in use, as it reported.
    busy: u16,
    /// Thousandths of its capacity that one fetcher more takes; of a slow one more than all.
    cost: u16,
    /// Fetchers it was handed to since that report, in [`SHARES`] each.
    handed_out: u32,
    /// Several members say that it is of no use.
    sunk: bool,
    /// It serves on a loopback address: of use to the index's own machine only.
    loopback: bool,
}

const _: () = assert!(size_of::<Card>() == 64, "a card is a cache line");

impl Default for Card {
    /// Nobody's.
    fn default() -> Self {
        let nowhere = SocketAddr::from(([0; 4], 0));
        Self::of(PeerId([0; 32]), nowhere, Load::default())
    }
}

impl Card {
    pub(super) fn of(peer: PeerId, address: SocketAddr, load: Load) -> Self {
        let slots = u32::from(load.uploads) + u32::from(load.free_slots);
        let in_slots = match slots {
            0 => 1_000, // it says that it can serve nobody
            _ => u32::from(load.uploads) * 1_000 / slots,
        };
        let rate = u64::from(load.rate_kib) * 1_000;
        let in_rate = rate.checked_div(u64::from(load.capacity_kib)).unwrap_or(0).min(1_000) as u32;
        let ip = match address.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        Self {
            peer,
            ip: ip.octets(),
            port: address.port(),
            busy: in_slots.max(in_rate) as u16,
            cost: match load.capacity_kib {
                0 => 1_000 / slots.clamp(1, 1_000),
                capacity => FETCH_KIB * 1_000 / capacity,
            }
            .clamp(LEAST_COST, u16::MAX.into()) as u16,
            handed_out: 0,
            sunk: false,
            loopback: ip.to_canonical().is_loopback(),
        }
    }

    pub(super) fn address(&self) -> SocketAddr {
        SocketAddr::new(Ipv6Addr::from(self.ip).to_canonical(), self.port)
    }

    /// What it is after a new report. Whoever reports all the time is not taken for idle every time.
    pub(super) fn renewed(&self, report: Self, due: bool) -> Self {
        let handed_out = if due { 0 } else { self.handed_out };
        Self { handed_out, sunk: self.sunk, ..report }
    }

    /// How much of its capacity is in use once everyone it was handed to has come, in [`SHARES`] for
    /// each thousandth; more than a thousand where that is too many.
    const fn strain(&self) -> u64 {
        let sunk = if self.sunk { SUNK } else { 0 };
        sunk + self.busy as u64 * SHARES as u64 + self.handed_out as u64 * self.cost as u64
    }

    /// It stands in an answer, at position `nth`: the further back, the less of the fetcher it gets.
    const fn hand_out(&mut self, nth: usize) {
        let share = if nth < 3 { SHARES >> (nth + 1) } else { 1 };
        self.handed_out = self.handed_out.saturating_add(share);
    }
}

/// The strain of a host that is of no use: more than any load makes, so all others go before it.
const SUNK: u64 = 1 << 56;
/// A fetcher turns to the first host of its answer most: half of it counts there, a quarter at the
/// second, an eighth at the third, a sixteenth at each further one.
const SHARES: u32 = 16;
/// What a fetcher is taken to draw where it can: about a quarter of a full Gbit/s.
const FETCH_KIB: u32 = 32 << 10;
/// The least of its capacity that a fetcher takes of any host, in thousandths, whatever it says of
/// itself: a host that lies draws no more than a hundred fetchers at a time.
const LEAST_COST: u32 = 10;

/// Who asks for hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker {
    /// Its number: it is never handed itself.
    pub member: MemberNumber,
    /// It asks from a loopback address, so hosts on loopback are of use to it.
    pub loopback: bool,
}

impl Catalog {
    /// Whether `host` goes behind all others from now on: it is of no use, by what members say.
    pub fn sink(&mut self, host: MemberNumber, sunk: bool) {
        if let Some(card) = self.cards.get_mut(host.0 as usize) {
            card.sunk = sunk;
        }
    }

    /// Who hosts what is looked for: at most as many as were asked for and fit a datagram, the least
    /// strained first.
    pub fn search(&mut self, asker: Asker, search: &Search) -> Result<Found, Refusal> {
        let (slot, record) = self.resolve(&search.target)?;
        let record = record.cloned();
        let wanted = usize::from(search.hosts.min(Search::MAX_HOSTS));
        let chosen = self.choose(slot, asker, wanted, &search.avoid);
        let content = &self.contents[slot as usize];
        let (id, size, hosts_in_all) = (content.id, content.size, content.hosts.len() as u32);
        let mut room = Found::room(record.as_ref());
        let mut hosts = Vec::with_capacity(chosen.len());
        for (strain, hosting) in chosen {
            let card = &mut self.cards[hosting.member.0 as usize];
            let load = (strain / u64::from(SHARES)).min(1_000) as u16;
            let (peer, address, held) = (card.peer, card.address(), hosting.held);
            let host = Host { peer, address, held, load };
            if host.wire_len() > room {
                break;
            }
            room -= host.wire_len();
            card.hand_out(hosts.len());
            hosts.push(host);
        }
        if hosts.is_empty() {
            let text = match hosts_in_all {
                1 => {
                    "its only host is the asking machine, or reachable on the index's machine only"
                }
                _ => "its hosts are reachable on the index's own machine only",
            };
            return Err(refuse(Code::NoHosts, text));
        }
        Ok(Found { id, size, record, hosts_in_all, hosts })
    }

    /// Hosts for one who asks, each with its strain, the least strained first.
    fn choose(
        &mut self,
        slot: Slot,
        asker: Asker,
        wanted: usize,
        avoid: &[PeerId],
    ) -> Vec<(u64, Hosting)> {
        let hosts = &self.contents[slot as usize].hosts;
        let (all, complete) = (hosts.len(), self.contents[slot as usize].complete as usize);
        let mut chosen = Vec::with_capacity(wanted + 1);
        if all <= wanted + 1 {
            let eligible = hosts.iter().filter(|h| self.is_eligible(asker, h.member));
            chosen.extend(eligible.map(|h| (self.strain(h, avoid), *h)));
        } else {
            let partial = all - complete;
            // Both kinds by their share of the hosts, but at least a quarter of each: a swarm in
            // which new peers know only seeds, or only each other, does not mix.
            let quarter = wanted.div_ceil(4);
            let most = wanted - quarter.min(complete);
            let from_partial = (wanted * partial).div_ceil(all).max(quarter).min(most).min(partial);
            self.draw(slot, complete..all, from_partial, (asker, avoid), &mut chosen);
            let rest = wanted - chosen.len();
            self.draw(slot, 0..complete, rest, (asker, avoid), &mut chosen);
            let rest = wanted - chosen.len();
            self.draw(slot, complete..all, rest, (asker, avoid), &mut chosen);
        }
        chosen.sort_by_key(|(strain, _)| *strain);
        chosen.truncate(wanted);
        chosen
    }

    fn strain(&self, host: &Hosting, avoid: &[PeerId]) -> u64 {
        strain(&self.cards[host.member.0 as usize], avoid)
    }

    fn is_eligible(&self, asker: Asker, host: MemberNumber) -> bool {
        host != asker.member && (asker.loopback || !self.cards[host.0 as usize].loopback)
    }

    /// Draws `count` hosts of a range of a content's hosts, none twice: each the better of two drawn
    /// blindly.
    fn draw(
        &mut self,
        slot: Slot,
        range: std::ops::Range<usize>,
        count: usize,
        (asker, avoid): (Asker, &[PeerId]),
        chosen: &mut Vec<(u64, Hosting)>,
    ) {
        let hosts = &self.contents[slot as usize].hosts[range];
        let cards = &self.cards;
        let is_fresh = |host: MemberNumber, chosen: &[(u64, Hosting)]| {
            let eligible =
                host != asker.member && (asker.loopback || !cards[host.0 as usize].loopback);
            eligible && chosen.iter().all(|(_, c)| c.member != host)
        };
        let weighed = |h: &Hosting| (strain(&cards[h.member.0 as usize], avoid), *h);
        let dice = &mut self.dice;
        let pick = |dice: &mut Dice, n: usize| dice.below(n as u64) as usize;
        if hosts.len() <= 4 * usize::from(Search::MAX_HOSTS) {
            let fresh = hosts.iter().filter(|h| is_fresh(h.member, chosen));
            let mut left: Vec<(u64, Hosting)> = fresh.map(weighed).collect();
            for _ in 0..count.min(left.len()) {
                let (a, b) = (pick(dice, left.len()), pick(dice, left.len()));
                let better = if left[a].0 <= left[b].0 { a } else { b };
                chosen.push(left.swap_remove(better));
            }
            return;
        }
        // Far more hosts than wanted: drawing one twice is rare, so draws that miss are forgiven up
        // to a bound.
        let enough = chosen.len() + count;
        for _ in 0..4 * count {
            let (a, b) = (hosts[pick(dice, hosts.len())], hosts[pick(dice, hosts.len())]);
            let (a, b) = (weighed(&a), weighed(&b));
            let better = if a.0 <= b.0 { a } else { b };
            if is_fresh(better.1.member, chosen) {
                chosen.push(better);
            }
            if chosen.len() == enough {
                return;
            }
        }
    }
}

/// How strained a host is to one who has no use for those in `avoid`.
fn strain(card: &Card, avoid: &[PeerId]) -> u64 {
    card.strain() + if avoid.contains(&card.peer) { SUNK } else { 0 }
}
