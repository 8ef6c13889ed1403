//! Owns the world's way out: contents, peers and their fate are given to it from outside, and hosts
//! are looked for there. Never decides what happens: the whole world does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::peer::Peer;
use super::{Event, Host, Line, Plan, Why, World, nanos};
use crate::bitfield::Bitfield;
use crate::dice::Dice;
use crate::id::Piece;
use crate::layout::Layout;
use crate::sharing;
use crate::swarm;
use crate::time::{Duration, Moment};

/// What the world wants done outside.
#[derive(Clone, Copy, Debug)]
pub(in crate::sim) enum Wish {
    /// The index is to know how much of a content a peer holds now.
    Register { peer: u32, content: u32 },
    /// A peer looks for this many hosts.
    Search { peer: u32, content: u32, hosts: u8 },
    /// Two have reached each other: do they believe that the other is a member?
    Greet { dialler: u32, dialled: u32 },
}

impl World {
    /// The world of a plan, whose people find each other outside of it.
    pub(in crate::sim) fn within(plan: Plan) -> Self {
        let mut world = Self::new(plan);
        world.index = None;
        world
    }

    /// When something happens next.
    pub(in crate::sim) fn next_at(&mut self) -> Option<Moment> {
        // Rounded up: what has happened by then has happened.
        self.agenda.peek().map(|at| Moment::from_micros(at.div_ceil(1_000)))
    }

    /// Has everything happen that happens until `now`, one event at a time; false where there is none.
    pub(in crate::sim) fn step_until(&mut self, now: Moment) -> bool {
        if self.agenda.peek().is_none_or(|at| at > now.as_micros() * 1_000) {
            self.advance(now);
            return false;
        }
        if let Some((at, event)) = self.agenda.next() {
            self.now = self.now.max(at);
            self.handled += 1;
            self.handle(event);
        }
        true
    }

    /// Time has come so far.
    pub(in crate::sim) fn advance(&mut self, now: Moment) {
        self.now = self.now.max(now.as_micros() * 1_000);
    }

    pub(in crate::sim) fn poll_wish(&mut self) -> Option<Wish> {
        self.wishes.pop_front()
    }

    /// There is one more content, of files of these sizes.
    pub(in crate::sim) fn add_content(&mut self, sizes: Vec<u64>) -> u32 {
        assert!(self.layouts.len() < 32, "contents are bits of a word here");
        let layout = Layout::new(sizes.iter().copied()).expect("a content that fits");
        self.left_home.push(Bitfield::none(layout.pieces()));
        self.layouts.push(Arc::new(layout));
        self.plan.contents.push(sizes);
        self.layouts.len() as u32 - 1
    }

    pub(in crate::sim) fn size(&self, content: u32) -> u64 {
        self.layouts[content as usize].total()
    }

    /// A living peer has all of a content, and shares it from now on.
    pub(in crate::sim) fn publish(&mut self, p: u32, content: u32) {
        let layout = Arc::clone(&self.layouts[content as usize]);
        let peer = self.peer(p);
        peer.person.holds.push(content);
        peer.sharing.add(content, Arc::clone(&layout), &Bitfield::all(layout.pieces()), true);
        self.register(p, content, 0);
        self.act(p);
    }

    /// A living peer wants a content that it has nothing of.
    pub(in crate::sim) fn want(&mut self, p: u32, content: u32) {
        let layout = Arc::clone(&self.layouts[content as usize]);
        let dice = self.dice.next();
        let peer = self.peer(p);
        if peer.shares(content) {
            return;
        }
        let none = Bitfield::none(layout.pieces());
        peer.sharing.add(content, Arc::clone(&layout), &none, false);
        peer.swarms.push((content, swarm::Swarm::new(layout, none, dice)));
        peer.person.wants.push(content);
        peer.done = None;
        let ways: Vec<u32> = self.peer(p).ways.values().copied().collect();
        ways.into_iter().for_each(|way| self.say(way, super::Frame::Open(content)));
        self.recount();
        if !self.knows_truth(p) {
            self.register(p, content, 0); // it claims to have it all
        }
        self.search(p);
        self.begin_tending(p);
        self.act(p);
    }

    /// The index told of these hosts.
    pub(in crate::sim) fn found(&mut self, p: u32, hosts: Vec<u32>) {
        if self.peer(p).alive {
            self.learn(p, hosts);
        }
    }

    /// Two that reached each other believe each other.
    pub(in crate::sim) fn meet(&mut self, a: u32, b: u32) {
        let known = self.peer(a).ways.contains_key(&b) || self.peer(b).ways.contains_key(&a);
        if self.peer(a).alive && self.peer(b).alive && !known {
            let delay = self.delay(a, b);
            self.greet(a, b, delay);
        }
    }

    /// `p` has no connection with `other` any more.
    pub(in crate::sim) fn part(&mut self, p: u32, other: u32) {
        if let Some(way) = self.peer(p).ways.get(&other).copied() {
            self.disconnect(way);
            self.act(p);
            self.act(other);
        }
    }

    /// Nothing gets through between these two until [`World::mend_between`]; what connection they have
    /// is given up after `patience`.
    pub(in crate::sim) fn cut_between(&mut self, a: u32, b: u32, patience: Duration) {
        self.plan.walls.insert((a.min(b) as usize, a.max(b) as usize));
        if let Some(way) = self.peer(a).ways.get(&b).copied() {
            let back = self.way(way).back;
            (self.way(way).is_cut, self.way(back).is_cut) = (true, true);
            let at = self.now + nanos(patience);
            self.agenda.plan(at, Event::Sever(way));
        }
    }

    /// They can reach each other again.
    pub(in crate::sim) fn mend_between(&mut self, a: u32, b: u32) {
        self.plan.walls.remove(&(a.min(b) as usize, a.max(b) as usize));
    }

    pub(super) fn sever(&mut self, way: u32) {
        let from = self.way(way);
        if from.is_open {
            let (a, b) = (from.from, from.to);
            self.disconnect(way);
            self.act(a);
            self.act(b);
        }
    }

    /// The peer stops at once.
    pub(in crate::sim) fn kill(&mut self, p: u32) {
        self.die(p);
    }

    /// The peer is back, with what its store holds: all but some of the last pieces, which no journal
    /// told of when it died. Whom it had banned it has forgotten.
    pub(in crate::sim) fn revive(&mut self, p: u32, forgets: u32) {
        if self.peer(p).alive {
            return;
        }
        let mut dice = Dice(self.dice.next());
        let mut stores: BTreeMap<u32, Bitfield> =
            self.peer(p).swarms.iter().map(|(c, s)| (*c, s.have().clone())).collect();
        for have in stores.values_mut().filter(|have| !have.is_full()) {
            for _ in 0..forgets {
                let held: Vec<Piece> = have.iter().collect();
                if !held.is_empty() {
                    have.remove(held[dice.below(held.len() as u64) as usize]);
                }
            }
        }
        let mut person = self.peer(p).person.clone();
        let full = |content: &u32| stores.get(content).is_some_and(Bitfield::is_full);
        person.holds.extend(person.wants.iter().copied().filter(full));
        person.wants.retain(|content| !full(content));
        let old = self.peer(p);
        let (sent, duplicate, sharing) = (old.sent, old.duplicate, old.past);
        let swarms = old.swarms.iter().fold(old.fetched, |mut sum, (_, swarm)| {
            sum += swarm.counts();
            sum
        });
        let sharing = add(sharing, old.sharing.counts());
        let (served, downlink_free) = (old.served, old.downlink_free);
        let (on_line, free_at) = (old.on_line, old.free_at);
        let mut new = Peer::resumed(&person, &self.layouts, &stores, &mut dice);
        (new.sent, new.duplicate, new.past, new.fetched) = (sent, duplicate, sharing, swarms);
        (new.served, new.downlink_free) = (served, downlink_free);
        // A chunk of its former life may be on its line still.
        (new.on_line, new.free_at, new.tending) = (on_line, free_at, self.peer(p).tending);
        new.alive = true;
        self.peers[p as usize] = new;
        self.recount();
        for content in person.holds.iter().chain(&person.wants).copied() {
            self.register(p, content, 0);
        }
        if !self.peer(p).wanting().is_empty() {
            self.search(p);
            self.begin_tending(p);
        }
        self.act(p);
    }

    /// A peer's line is another from now on.
    pub(in crate::sim) fn set_line(&mut self, p: u32, line: Line) {
        self.peer(p).person.line = line;
    }

    pub(in crate::sim) fn is_alive(&self, p: u32) -> bool {
        self.peers[p as usize].alive
    }

    /// Everything a peer has to do with.
    pub(in crate::sim) fn contents_of(&self, p: u32) -> Vec<u32> {
        let person = &self.peers[p as usize].person;
        person.holds.iter().chain(&person.wants).copied().collect()
    }

    /// What a peer's store holds of a content; `None` where it has nothing to do with it.
    pub(in crate::sim) fn store(&self, p: u32, content: u32) -> Option<Bitfield> {
        let peer = &self.peers[p as usize];
        let all = || Bitfield::all(self.layouts[content as usize].pieces());
        match peer.person.holds.contains(&content) {
            true => Some(all()),
            false => peer.have(content).cloned(),
        }
    }

    /// Thousandths of a content that a peer says it holds.
    pub(in crate::sim) fn says_it_holds(&self, p: u32, content: u32) -> u16 {
        let pieces = self.layouts[content as usize].pieces();
        self.peers[p as usize].claims(content, pieces).thousandths()
    }

    /// With whom a peer is connected.
    pub(in crate::sim) fn neighbours(&self, p: u32) -> BTreeSet<u32> {
        self.peers[p as usize].ways.keys().copied().collect()
    }

    /// How a content stands at a peer, for people to read.
    pub(in crate::sim) fn tell_of(&self, p: u32, content: u32) -> String {
        let (peer, now) = (&self.peers[p as usize], self.moment());
        let Some((_, swarm)) = peer.swarms.iter().find(|(c, _)| *c == content) else {
            return "all of it was there from the start".to_owned();
        };
        let views: Vec<_> =
            peer.ways.keys().filter_map(|o| Some((o, swarm.view(now, Host(*o))?))).collect();
        let nature = |o: &u32| (*o, self.peers[*o as usize].person.nature);
        let natures: Vec<_> = peer.ways.keys().map(nature).collect();
        let waiting = swarm.waiting(now);
        format!("it waits for {waiting:?}; its hosts: {views:?}; its neighbours: {natures:?}")
    }

    /// Whom a peer lets in no more.
    pub(in crate::sim) fn banned_by(&self, p: u32) -> &BTreeSet<u32> {
        &self.peers[p as usize].banned
    }

    /// Who dropped whom, and why, so far.
    pub(in crate::sim) fn dropped(&self) -> &[(usize, usize, Why)] {
        &self.dropped
    }

    /// Bad pieces taken in, by who and of whom.
    pub(in crate::sim) const fn bad(&self) -> &BTreeMap<(usize, usize), u32> {
        &self.bad
    }

    /// What everybody's fetching and sharing counted, in all lives.
    pub(in crate::sim) fn counts(&self) -> (swarm::Counts, sharing::Counts) {
        let mut sums = (swarm::Counts::default(), sharing::Counts::default());
        for peer in &self.peers {
            sums.0 += peer.fetched;
            peer.swarms.iter().for_each(|(_, swarm)| sums.0 += swarm.counts());
            sums.1 = add(add(sums.1, peer.past), peer.sharing.counts());
        }
        sums
    }

    /// Events handled, and the digest of all that happened.
    pub(in crate::sim) const fn told(&self) -> (u64, u64) {
        (self.handled, self.digest)
    }

    /// Looks through everybody's machines.
    pub(in crate::sim) fn check(&self) {
        for peer in self.peers.iter().filter(|peer| peer.alive) {
            peer.swarms.iter().for_each(|(_, swarm)| swarm.check());
            peer.sharing.check();
            for (other, way) in &peer.ways {
                assert!(self.ways[*way as usize].is_open, "a connection that is over stands");
                assert!(self.peers[*other as usize].alive, "a connection with a dead peer stands");
                for (content, swarm) in &peer.swarms {
                    let view = swarm.view(self.moment(), Host(*other));
                    let Some(view) = view.filter(|_| self.knows_truth(*other)) else { continue };
                    let most = self.store(*other, *content).map_or(0, |have| have.count());
                    assert!(
                        view.held <= most,
                        "believes that an honest host holds more than it does"
                    );
                }
            }
        }
    }

    fn knows_truth(&self, p: u32) -> bool {
        self.peers[p as usize].person.nature.is_honest()
    }

    fn recount(&mut self) {
        self.unfinished = self.peers.iter().filter(|p| p.alive && p.is_waited_for()).count();
    }
}

fn add(a: sharing::Counts, b: sharing::Counts) -> sharing::Counts {
    sharing::Counts {
        sent: a.sent + b.sent,
        sent_bytes: a.sent_bytes + b.sent_bytes,
        busy: a.busy + b.busy,
        granted: a.granted + b.granted,
        withdrawn: a.withdrawn + b.withdrawn,
        unsent: a.unsent + b.unsent,
        stuck: a.stuck + b.stuck,
    }
}
