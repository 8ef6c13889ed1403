//! Owns what people and fate do in a world: share, ask, watch, move, die, come back; and that it ends.

use crate::id::{ContentId, Name, Version};
use crate::link::Link;
use crate::registrar::{Boot, Registrar, Settings, Table};
use crate::time::Duration;
use crate::trust::{NameRecord, Role};
use crate::wire::datagram::{HELD_ALL, Item, List, Load, Request, Search, Target};
use crate::wire::desk::Removal;

use super::{Event, HEARTBEAT, IndexWorld, Mirror, Saved, chance, throw};

impl IndexWorld {
    /// Something a person or fate does.
    pub(super) fn trouble(&mut self) {
        if self.mended {
            return;
        }
        let wait = Duration::from_millis(20 + throw(&mut self.dice, 400) as u64);
        self.at(wait, Event::Trouble);
        let at = throw(&mut self.dice, self.machines.len());
        match throw(&mut self.dice, 100) {
            0..30 => self.share(at),
            30..45 => self.hold_more(at),
            45..55 => self.unshare(at),
            55..70 => self.ask(at),
            70..75 => self.watch(at),
            75..78 => self.report_load(at),
            78..82 => self.move_house(at),
            _ if !self.plan.deaths => self.hold_more(at),
            82..88 => self.die(at),
            88..90 => self.index_down(),
            90 if self.story.steps.is_multiple_of(5) => self.remove(at),
            _ => {}
        }
    }

    pub(super) fn die(&mut self, at: usize) {
        if self.kill(at) {
            let wait = Duration::from_millis(throw(&mut self.dice, 40_000) as u64);
            self.at(wait, Event::Rebirth { machine: at });
        }
    }

    /// The machine stops at once; false where it did before.
    pub(in crate::sim) fn kill(&mut self, at: usize) -> bool {
        self.machines[at].due = None;
        self.machines[at].link.take().is_some()
    }

    pub(super) fn share(&mut self, at: usize) {
        let wall = self.wall();
        let known: Vec<Item> =
            self.machines.iter().flat_map(|m| m.hosts.values().cloned()).collect();
        let fresh = known.is_empty() || chance(&mut self.dice, 500);
        let network = self.key().network();
        let (named, number) = (chance(&mut self.dice, 400), throw(&mut self.dice, 3));
        let machine = &mut self.machines[at];
        let item = if fresh && machine.role != Role::Read {
            let mut hash = [0; 32];
            hash[..8].copy_from_slice(&self.dice.next().to_be_bytes());
            let id = ContentId::file(hash);
            let size = 1 + u64::from(hash[0]);
            let name: Name = format!("name-{number}-{}", at % 5).parse().expect("a name");
            let version = machine.versions.get(&name).copied().unwrap_or(0) + 1;
            let sign =
                |name| NameRecord::sign(&machine.key, network, name, Version(version), id, wall);
            let record = named.then(|| sign(name.clone()));
            if named {
                machine.versions.insert(name, version);
            }
            Item { id, size, held: HELD_ALL, name: record }
        } else if known.is_empty() {
            return;
        } else {
            let mut item = known[throw(&mut self.dice, known.len())].clone();
            item.held = throw(&mut self.dice, 1_001) as u16;
            if machine.role != Role::Read && chance(&mut self.dice, 500) {
                item.name = None;
            }
            item
        };
        if !machine.removed {
            self.host(at, item);
        }
    }

    /// The machine hosts this from now on.
    pub(in crate::sim) fn host(&mut self, at: usize, item: Item) {
        let now = self.now;
        let machine = &mut self.machines[at];
        machine.registered.remove(&item.id);
        machine.hosts.insert(item.id, item.clone());
        if let Some(link) = &mut machine.link {
            link.share(now, item);
            self.carry_link(at);
        }
    }

    /// It holds so much of it now.
    pub(in crate::sim) fn hold(&mut self, at: usize, id: ContentId, held: u16) {
        let now = self.now;
        let machine = &mut self.machines[at];
        if let Some(item) = machine.hosts.get_mut(&id) {
            item.held = held;
        }
        if let Some(link) = &mut machine.link {
            link.update_held(now, id, held);
            self.carry_link(at);
        }
    }

    /// Asks the index, where it is up; the answer is [`News`].
    pub(in crate::sim) fn search(&mut self, at: usize, target: Target, hosts: u8) {
        let now = self.now;
        let machine = &mut self.machines[at];
        if let Some(link) = &mut machine.link {
            machine.questions.insert(
                link.ask(now, Request::Search(Search { target, hosts, avoid: vec![] })),
                now,
            );
            self.carry_link(at);
        }
    }

    pub(super) fn hold_more(&mut self, at: usize) {
        let machine = &mut self.machines[at];
        let ids: Vec<ContentId> = machine.hosts.keys().copied().collect();
        if ids.is_empty() {
            return;
        }
        let id = ids[throw(&mut self.dice, ids.len())];
        let held = throw(&mut self.dice, 1_001) as u16;
        self.hold(at, id, held);
    }

    pub(super) fn unshare(&mut self, at: usize) {
        let now = self.now;
        let machine = &mut self.machines[at];
        let ids: Vec<ContentId> = machine.hosts.keys().copied().collect();
        if ids.is_empty() {
            return;
        }
        let id = ids[throw(&mut self.dice, ids.len())];
        machine.hosts.remove(&id);
        if let Some(link) = &mut machine.link {
            link.withdraw(now, id);
            self.carry_link(at);
        }
    }

    pub(super) fn ask(&mut self, at: usize) {
        let now = self.now;
        let items: Vec<Item> =
            self.machines.iter().flat_map(|m| m.hosts.values().cloned()).collect();
        let machine = &mut self.machines[at];
        let Some(link) = &mut machine.link else { return };
        if items.is_empty() {
            return;
        }
        let item = &items[throw(&mut self.dice, items.len())];
        let target = match &item.name {
            Some(record) => Target::Name(record.name.clone(), None),
            None => Target::Id(item.id),
        };
        let search = Search { target, hosts: 16, avoid: vec![] };
        machine.questions.insert(link.ask(now, Request::Search(search)), now);
        let list = List { glob: "name-*".to_owned(), after: None };
        machine.questions.insert(link.ask(now, Request::List(list)), now);
        self.carry_link(at);
    }

    pub(in crate::sim) fn watch(&mut self, at: usize) {
        let now = self.now;
        let (ends, all) = (chance(&mut self.dice, 200), chance(&mut self.dice, 600));
        let machine = &mut self.machines[at];
        let Some(link) = &mut machine.link else { return };
        if ends {
            let before = machine.mirror.take().and_then(|mirror| mirror.listing);
            machine.abandoned.extend(before.map(|(id, _)| id));
            link.unwatch(now);
        } else {
            let glob = if all { "*" } else { "name-[01]-*" };
            if machine.mirror.as_ref().is_none_or(|mirror| mirror.glob != glob) {
                let before = machine.mirror.replace(Mirror::new(glob));
                let before = before.and_then(|mirror| mirror.listing);
                machine.abandoned.extend(before.map(|(id, _)| id));
            }
            link.watch(now, glob.to_owned());
        }
        self.carry_link(at);
    }

    pub(in crate::sim) fn report_load(&mut self, at: usize) {
        let uploads = throw(&mut self.dice, 5) as u16;
        if let Some(link) = &mut self.machines[at].link {
            link.set_load(Load { uploads, free_slots: 5 - uploads, rate_kib: 0, capacity_kib: 0 });
        }
    }

    /// A machine's address changes under way, as a laptop's does.
    pub(in crate::sim) fn move_house(&mut self, at: usize) {
        let port = 1_024 + throw(&mut self.dice, 60_000) as u16;
        self.machines[at].address.set_port(port);
    }

    pub(in crate::sim) fn remove(&mut self, at: usize) {
        let (now, wall) = (self.now, self.wall());
        let gone = self.machines.iter().filter(|machine| machine.removed).count();
        let Some(index) = &mut self.index else { return };
        let peer = self.machines[at].key.peer();
        let known = index.members(now).iter().any(|member| member.peer == peer);
        if gone < 2 && known {
            assert_eq!(index.remove(now, wall, &Removal::Peer(peer)), Ok(1));
            let machine = &mut self.machines[at];
            (machine.removed, machine.was_removed) = (true, true);
            // Who watched there gives up: a watch of the same, begun later, would else be none.
            let before = machine.mirror.take().and_then(|mirror| mirror.listing);
            machine.abandoned.extend(before.map(|(id, _)| id));
            if let Some(link) = &mut machine.link {
                link.unwatch(now);
            }
            self.carry_link(at);
            self.carry_index();
        }
    }

    pub(in crate::sim) fn index_down(&mut self) {
        if let Some(index) = self.index.take() {
            self.story.count(&index.stats());
            self.story.restarts += 1;
            let saved = match throw(&mut self.dice, 4) {
                0 => Saved::Nothing,
                1 => Saved::Members,
                _ => Saved::All,
            };
            let wait = Duration::from_millis(throw(&mut self.dice, 30_000) as u64);
            self.at(wait, Event::IndexUp { saved });
        }
    }

    pub(super) fn index_up(&mut self, saved: Saved) {
        // A machine that was removed stays out only where the index knows that it did.
        match saved {
            Saved::All => {}
            Saved::Members => self.rows.retain(|(table, _), _| *table <= Table::Revocations),
            Saved::Nothing => {
                self.rows.clear();
                self.machines.iter_mut().for_each(|machine| machine.removed = false);
            }
        }
        self.boots += 1;
        let mut seed = [3; 32];
        seed[..8].copy_from_slice(&self.dice.next().to_be_bytes());
        let boot = Boot {
            id: self.boots,
            cookie_key: seed,
            dice: self.dice.next(),
            secret_seed: *blake3::hash(&seed).as_bytes(),
        };
        let settings = Settings {
            heartbeat_s: HEARTBEAT.as_secs() as u16,
            requests_a_second: self.plan.requests_a_second,
            burst: 2 * self.plan.requests_a_second,
            ..Settings::default()
        };
        let rows = self.rows.iter().map(|((t, key), value)| (*t, key.clone(), value.clone()));
        let rows: Vec<_> = rows.collect();
        let index =
            Registrar::new(self.key(), boot, settings, rows.into_iter(), self.now, self.wall());
        self.index = Some(index.expect("what was saved is read back"));
        self.carry_index();
    }

    pub(in crate::sim) fn rebirth(&mut self, at: usize) {
        let now = self.now;
        let seed = self.dice.next();
        let machine = &mut self.machines[at];
        if machine.link.is_some() {
            return;
        }
        machine.life += 1;
        machine.fetching = false;
        machine.registered.clear();
        machine.questions.clear();
        machine.abandoned.clear();
        machine.mirror = None;
        let mut link = Link::new(seed);
        link.set_port(7_000 + at as u16);
        for item in machine.hosts.values() {
            link.share(now, item.clone());
        }
        link.tick(now);
        machine.link = Some(link);
        self.carry_link(at);
    }

    /// The troubles are over: nothing is lost any more, and everybody who was coming back is back.
    pub(in crate::sim) fn mend(&mut self) {
        self.mended = true;
        (self.plan.lost, self.plan.late) = (0, 0);
        if self.index.is_none() {
            self.index_up(Saved::All);
        }
        let all = 0..if self.plan.alone { self.machines.len() } else { 0 };
        let reborn: Vec<usize> = all.filter(|_| chance(&mut self.dice, 700)).collect();
        for at in reborn {
            self.rebirth(at);
        }
        self.events.retain(|_, e| !matches!(e, Event::Rebirth { .. } | Event::IndexUp { .. }));
        for at in 0..self.machines.len() {
            if at % 3 == 0 && self.machines[at].mirror.is_none() {
                self.watch_all(at);
            }
        }
    }

    pub(super) fn watch_all(&mut self, at: usize) {
        let now = self.now;
        let machine = &mut self.machines[at];
        if let Some(link) = machine.link.as_mut().filter(|_| !machine.removed) {
            machine.mirror = Some(Mirror::new("*"));
            link.watch(now, "*".to_owned());
            self.carry_link(at);
        }
    }
}
