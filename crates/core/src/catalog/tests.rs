use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::time::WallTime;
use crate::wire::datagram::{Row, RowKey, Search, Target, digest_of};

const ROOMY: Load = Load { uploads: 0, free_slots: 10, rate_kib: 0, capacity_kib: 0 };

fn id(n: u8) -> ContentId {
    if n.is_multiple_of(2) { ContentId::file([n; 32]) } else { ContentId::folder([n; 32]) }
}

fn peer(n: u32) -> PeerId {
    PeerId([n as u8; 32])
}

fn name(n: u8) -> Name {
    format!("name {n}").parse().unwrap()
}

fn record(n: u8, version: u32, of: ContentId, publisher: u32, time: u64) -> NameRecord {
    let (name, version, time) = (name(n), Version(version), WallTime(time));
    NameRecord { name, version, id: of, publisher: peer(publisher), time, signature: [9; 64] }
}

fn item(n: u8, held: u16, name: Option<NameRecord>) -> Item {
    Item { id: id(n), size: 100 + u64::from(n), held, name }
}

fn catalog(limits: Limits, members: u32) -> Catalog {
    let mut catalog = Catalog::new(limits, 1_000, 5);
    for member in 1..=members {
        let address = format!("10.0.{}.{}:70", member / 250, member % 250).parse().unwrap();
        catalog.report(MemberNumber(member), peer(member), address, ROOMY, true);
    }
    catalog
}

fn take(catalog: &mut Catalog, member: u32, item: &Item) -> Result<(), Code> {
    catalog.register(MemberNumber(member), item, |_| true).map_err(|refusal| refusal.code)
}

fn search(target: Target, hosts: u8) -> Search {
    Search { target, hosts, avoid: vec![] }
}

fn asker(member: u32) -> Asker {
    Asker { member: MemberNumber(member), loopback: false }
}

/// The rules of the catalog, written down as plainly as can be.
#[derive(Default)]
struct Naive {
    hosts: BTreeMap<ContentId, BTreeMap<u32, Item>>,
    names: BTreeMap<Name, BTreeMap<Version, NameRecord>>,
}

impl Naive {
    fn register(&mut self, member: u32, item: &Item) -> Result<(), Code> {
        let hosts = self.hosts.entry(item.id).or_default();
        if hosts.iter().any(|(other, theirs)| *other != member && theirs.size != item.size) {
            return Err(Code::SizeDiffers);
        }
        if let Some(record) = &item.name {
            let versions = self.names.entry(record.name.clone()).or_default();
            if versions.values().any(|known| known.publisher != record.publisher) {
                return Err(Code::NameTaken);
            }
            match versions.get(&record.version) {
                Some(known) if known.id != record.id => return Err(Code::StaleVersion),
                Some(_) => {}
                None => {
                    let next = versions.range(record.version..).next();
                    if next.is_some_and(|(_, later)| record.time > later.time) {
                        return Err(Code::StaleVersion);
                    }
                    versions.insert(record.version, record.clone());
                }
            }
        }
        hosts.insert(member, item.clone());
        Ok(())
    }

    fn drop_hosts(&mut self, member: u32, which: impl Fn(&ContentId) -> bool) {
        for (id, hosts) in &mut self.hosts {
            if which(id) {
                hosts.remove(&member);
            }
        }
    }

    fn listing(&self) -> Vec<Row> {
        let newest = || {
            let newest = |v: &BTreeMap<_, NameRecord>| v.values().last().cloned();
            self.names.values().filter_map(newest)
        };
        let row = |id: &ContentId, record: Option<&NameRecord>| {
            let hosts = self.hosts.get(id).filter(|hosts| !hosts.is_empty())?;
            Some(Row {
                key: RowKey { name: record.map(|r| r.name.clone()), id: *id },
                size: hosts.values().next()?.size,
                hosts: hosts.len() as u32,
                complete: hosts.values().filter(|item| item.held == HELD_ALL).count() as u32,
                version: record.map(|r| r.version),
                publisher: record.map(|r| r.publisher),
            })
        };
        let nameless = self.hosts.keys().filter(|id| newest().all(|r| r.id != **id));
        let mut rows: Vec<Row> = nameless.filter_map(|id| row(id, None)).collect();
        rows.extend(newest().filter_map(|record| row(&record.id, Some(&record))));
        rows.sort_by(|a, b| a.key.cmp(&b.key));
        rows
    }

    fn digest(&self, member: u32) -> u128 {
        let items = self.hosts.values().filter_map(|hosts| hosts.get(&member));
        items.map(digest_of).fold(0, u128::wrapping_add)
    }
}

#[derive(Clone, Debug)]
enum Op {
    Register(u32, Item),
    Withdraw(u32, u8),
    Evict(u32),
    /// A round of all these.
    Round(u32, BTreeSet<u8>),
}

fn op() -> impl Strategy<Value = Op> {
    let names = (0u8..3, 1u32..5, 1u32..3, 0u64..4);
    let item = (0u8..8, 0u16..=4, prop::option::weighted(0.4, names), 0u8..10).prop_map(
        |(n, held, named, odd)| Item {
            size: if odd == 0 { 1 } else { 100 + u64::from(n) },
            ..item(n, held * 250, named.map(|(at, v, p, t)| record(at, v, id(n), p, t)))
        },
    );
    prop_oneof![
        8 => (1u32..5, item).prop_map(|(member, item)| Op::Register(member, item)),
        3 => (1u32..5, 0u8..8).prop_map(|(member, n)| Op::Withdraw(member, n)),
        1 => (1u32..5).prop_map(Op::Evict),
        1 => (1u32..5, prop::collection::btree_set(0u8..8, 0..5)).prop_map(|(m, s)| Op::Round(m, s)),
    ]
}

fn apply(catalog: &mut Catalog, naive: &mut Naive, op: &Op, round: u32) {
    match op {
        Op::Register(member, item) => {
            assert_eq!(take(catalog, *member, item), naive.register(*member, item));
        }
        Op::Withdraw(member, n) => {
            let hosted = naive.hosts.get(&id(*n)).is_some_and(|hosts| hosts.contains_key(member));
            assert_eq!(catalog.withdraw(MemberNumber(*member), &id(*n)), hosted);
            naive.drop_hosts(*member, |other| *other == id(*n));
        }
        Op::Evict(member) => {
            catalog.evict(MemberNumber(*member));
            naive.drop_hosts(*member, |_| true);
            let address = "10.9.9.9:9".parse().unwrap();
            catalog.report(MemberNumber(*member), peer(*member), address, ROOMY, true);
        }
        Op::Round(member, named) => {
            catalog.enter_round(MemberNumber(*member), round);
            let mut kept = BTreeSet::new();
            for n in named {
                let told = item(*n, 500, None);
                let done = naive.register(*member, &told);
                assert_eq!(take(catalog, *member, &told), done);
                kept.extend(done.is_ok().then_some(told.id)); // what was refused is not named
            }
            catalog.end_round(MemberNumber(*member), round);
            naive.drop_hosts(*member, |of| !kept.contains(of));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn whatever_is_done_the_catalog_says_what_a_naive_one_says(ops in vec(op(), 1..80)) {
        let (mut catalog, mut naive) = (catalog(Limits::default(), 5), Naive::default());
        for (at, op) in ops.iter().enumerate() {
            apply(&mut catalog, &mut naive, op, at as u32 + 1);
            catalog.check();
            prop_assert_eq!(catalog.listing(), naive.listing());
            for member in 1..5 {
                prop_assert_eq!(catalog.digest(MemberNumber(member)), naive.digest(member));
            }
        }
    }

    #[test]
    fn what_a_watcher_is_told_adds_up_to_the_listing_however_answers_are_cut_and_mixed(
        ops in vec((op(), 0usize..6, any::<bool>()), 1..80),
    ) {
        let (mut catalog, mut naive) = (catalog(Limits::default(), 5), Naive::default());
        let (mut mirror, mut told) = (BTreeMap::new(), catalog.sequence());
        let mut before = told;
        // An answer to what was asked from `from`, of which only the first rows arrive; those that
        // were told already are passed over, the rest is taken.
        let mut tell = |catalog: &Catalog, again: bool, rows: usize| {
            let from = if again { before } else { told };
            before = told;
            for (number, row) in catalog.changed_since(from).unwrap().into_iter().take(rows) {
                if number <= told {
                    continue;
                }
                told = number;
                match row.hosts {
                    0 => mirror.remove(&row.key),
                    _ => mirror.insert(row.key.clone(), row),
                };
            }
            (told, mirror.values().cloned().collect::<Vec<_>>())
        };
        for (at, (op, rows, again)) in ops.iter().enumerate() {
            apply(&mut catalog, &mut naive, op, at as u32 + 1);
            tell(&catalog, *again, *rows);
        }
        let (told, mirror) = tell(&catalog, false, usize::MAX);
        prop_assert_eq!(told, catalog.sequence());
        prop_assert_eq!(mirror, catalog.listing());
    }

    #[test]
    fn nothing_one_member_does_changes_what_another_hosts(ops in vec(op(), 1..60)) {
        let mut catalog = catalog(Limits::default(), 5);
        let mine = [item(0, 1_000, Some(record(7, 1, id(0), 5, 1))), item(1, 300, None)];
        for item in &mine {
            prop_assert_eq!(take(&mut catalog, 5, item), Ok(()));
        }
        let digest = catalog.digest(MemberNumber(5));
        let mut naive = Naive::default();
        for item in &mine {
            naive.register(5, item).unwrap();
        }
        for (at, op) in ops.iter().enumerate() {
            apply(&mut catalog, &mut naive, op, at as u32 + 1);
        }
        prop_assert_eq!(catalog.digest(MemberNumber(5)), digest);
        let hosts = catalog.hosts();
        prop_assert_eq!(hosts[&id(0)][&peer(5)], 1_000);
        prop_assert_eq!(hosts[&id(1)][&peer(5)], 300);
        let found = catalog.search(asker(1), &search(Target::Name(name(7), None), 20)).unwrap();
        prop_assert_eq!(found.id, id(0));
    }

    #[test]
    fn a_walk_from_page_to_page_meets_each_lasting_row_once(
        before in vec(0u8..120, 0..120),
        between in vec(vec((0u8..120, any::<bool>()), 0..20), 20),
    ) {
        let mut catalog = catalog(Limits::default(), 2);
        for n in &before {
            take(&mut catalog, 1, &item(*n, 1_000, None)).unwrap();
        }
        let mut lasting: BTreeSet<RowKey> = catalog.listing().into_iter().map(|r| r.key).collect();
        let (mut met, mut after) = (vec![], None);
        let every = Pattern::new("*").unwrap();
        for changes in &between {
            let page = catalog.page(&every, after.as_ref()).page;
            met.extend(page.rows.iter().map(|row| row.key.clone()));
            after = page.rows.last().map(|row| row.key.clone()).or(after);
            if !page.more {
                break;
            }
            for (n, comes) in changes {
                if *comes {
                    take(&mut catalog, 2, &item(*n, 0, None)).unwrap();
                } else {
                    catalog.withdraw(MemberNumber(1), &id(*n));
                    catalog.withdraw(MemberNumber(2), &id(*n));
                    lasting.remove(&RowKey { name: None, id: id(*n) });
                }
            }
        }
        let mut once = BTreeSet::new();
        prop_assert!(met.iter().all(|key| once.insert(key)), "a row was met twice");
        prop_assert!(lasting.iter().all(|key| once.contains(key)), "a lasting row was missed");
    }
}

#[test]
fn a_name_moves_to_its_newest_version_and_leaves_the_older_one_nameless() {
    let mut catalog = catalog(Limits::default(), 3);
    take(&mut catalog, 1, &item(1, 1_000, Some(record(0, 1, id(1), 1, 10)))).unwrap();
    take(&mut catalog, 1, &item(2, 1_000, Some(record(0, 2, id(2), 1, 20)))).unwrap();
    let keys: Vec<RowKey> = catalog.listing().into_iter().map(|row| row.key).collect();
    let key = |named: Option<u8>, n| RowKey { name: named.map(name), id: id(n) };
    assert_eq!(keys, [key(None, 1), key(Some(0), 2)]);
    let old = catalog.search(asker(2), &search(Target::Name(name(0), Some(Version(1))), 20));
    assert_eq!(old.unwrap().id, id(1));
    // An old version told anew is no news; another content under its number is refused.
    assert_eq!(take(&mut catalog, 2, &item(1, 0, Some(record(0, 1, id(1), 1, 10)))), Ok(()));
    let other = item(3, 0, Some(record(0, 2, id(3), 1, 30)));
    assert_eq!(take(&mut catalog, 1, &other), Err(Code::StaleVersion));
    assert_eq!(
        take(&mut catalog, 2, &item(3, 0, Some(record(0, 9, id(3), 2, 30)))),
        Err(Code::NameTaken)
    );
}

#[test]
fn an_index_that_lost_its_file_takes_old_versions_as_history_but_not_as_news() {
    let mut catalog = catalog(Limits::default(), 3);
    take(&mut catalog, 1, &item(5, 1_000, Some(record(0, 5, id(5), 1, 50)))).unwrap();
    assert_eq!(take(&mut catalog, 2, &item(2, 1_000, Some(record(0, 2, id(2), 1, 20)))), Ok(()));
    assert_eq!(
        take(&mut catalog, 1, &item(3, 9, Some(record(0, 3, id(3), 1, 60)))),
        Err(Code::StaleVersion)
    );
    let newest = catalog.search(asker(3), &search(Target::Name(name(0), None), 20)).unwrap();
    assert_eq!((newest.id, newest.record.unwrap().version), (id(5), Version(5)));
    catalog.check();
}

#[test]
fn a_forged_record_leaves_no_trace_and_a_known_one_is_not_verified_again() {
    let mut catalog = catalog(Limits::default(), 3);
    let named = item(1, 1_000, Some(record(0, 1, id(1), 1, 10)));
    let forged = catalog.register(MemberNumber(1), &named, |_| false).unwrap_err();
    assert_eq!(forged.code, Code::BadSignature);
    assert!(catalog.listing().is_empty() && !catalog.knows(&id(1)));
    take(&mut catalog, 1, &named).unwrap();
    catalog.register(MemberNumber(2), &named, |_| panic!("verified twice")).unwrap();
    let mut altered = named.clone();
    if let Some(record) = &mut altered.name {
        record.signature[0] ^= 1;
    }
    let refused = catalog.register(MemberNumber(3), &altered, |_| false).unwrap_err();
    assert_eq!(refused.code, Code::BadSignature);
    catalog.check();
}

#[test]
fn a_refusal_says_what_is_the_case_and_what_to_do() {
    let mut catalog = catalog(Limits::default(), 2);
    let text = |catalog: &mut Catalog, target| {
        let refusal = catalog.search(asker(2), &search(target, 9)).unwrap_err();
        (refusal.code, refusal.text)
    };
    let named = |version: Option<u32>| Target::Name(name(0), version.map(Version));
    let (code, said) = text(&mut catalog, named(None));
    assert_eq!(code, Code::NotFound);
    assert!(said.contains("nothing is named name 0"), "{said}");
    take(&mut catalog, 1, &item(1, 1_000, Some(record(0, 1, id(1), 1, 10)))).unwrap();
    take(&mut catalog, 1, &item(2, 1_000, Some(record(0, 2, id(2), 1, 20)))).unwrap();
    catalog.withdraw(MemberNumber(1), &id(2));
    let (code, said) = text(&mut catalog, named(None));
    assert_eq!(code, Code::NoHosts);
    assert!(said.contains("@2 has no host") && said.contains("name 0@1"), "{said}");
    let (code, said) = text(&mut catalog, named(Some(7)));
    assert_eq!(code, Code::NotFound);
    assert!(said.contains("no version @7") && said.contains("@2"), "{said}");
    assert_eq!(text(&mut catalog, Target::Id(id(9))).0, Code::NotFound);
    assert_eq!(text(&mut catalog, Target::Id(id(2))).0, Code::NoHosts);
    let alone = catalog
        .search(Asker { member: MemberNumber(1), loopback: false }, &search(Target::Id(id(1)), 9));
    assert_eq!(alone.unwrap_err().code, Code::NoHosts, "nobody is handed itself");
}

#[test]
fn every_limit_holds_and_refuses_only_what_goes_beyond_it() {
    let limits = Limits {
        contents: 6,
        registrations: 7,
        registrations_a_member: 4,
        names: 2,
        names_a_content: 1,
        versions_a_name: 2,
        records: 4,
        records_a_publisher: 3,
        changes: 3,
    };
    let mut catalog = catalog(limits, 4);
    for n in 0..4 {
        assert_eq!(take(&mut catalog, 1, &item(n, 0, None)), Ok(()));
    }
    assert_eq!(take(&mut catalog, 1, &item(4, 0, None)), Err(Code::Quota));
    assert_eq!(take(&mut catalog, 1, &item(3, 9, None)), Ok(()), "what is there may change");
    assert_eq!(take(&mut catalog, 2, &item(4, 0, Some(record(0, 1, id(4), 2, 1)))), Ok(()));
    assert_eq!(
        take(&mut catalog, 2, &item(4, 0, Some(record(1, 1, id(4), 2, 1)))),
        Err(Code::Quota)
    );
    assert_eq!(take(&mut catalog, 2, &item(5, 0, Some(record(0, 2, id(5), 2, 2)))), Ok(()));
    assert_eq!(take(&mut catalog, 2, &item(6, 0, None)), Err(Code::Full), "contents");
    assert_eq!(
        take(&mut catalog, 3, &item(1, 0, Some(record(0, 3, id(1), 2, 3)))),
        Err(Code::Quota)
    );
    catalog.withdraw(MemberNumber(2), &id(4));
    assert_eq!(take(&mut catalog, 3, &item(1, 0, Some(record(0, 3, id(1), 2, 3)))), Ok(()));
    assert!(!catalog.knows(&id(4)), "the oldest version without a host made room");
    assert_eq!(take(&mut catalog, 3, &item(0, 0, Some(record(1, 1, id(0), 3, 1)))), Ok(()));
    assert_eq!(take(&mut catalog, 3, &item(2, 0, None)), Err(Code::Full), "registrations");
    assert_eq!(catalog.changed_since(1_000), None, "three changes are remembered, no more");
    assert!(catalog.changed_since(catalog.sequence() - 3).is_some());
    assert_eq!(catalog.changed_since(catalog.sequence() + 1), None);
    catalog.check();
}

#[test]
fn another_size_is_believed_only_of_who_hosts_alone() {
    let mut catalog = catalog(Limits::default(), 2);
    let small = Item { size: 5, ..item(1, 1_000, None) };
    take(&mut catalog, 1, &item(1, 1_000, None)).unwrap();
    assert_eq!(take(&mut catalog, 2, &small), Err(Code::SizeDiffers));
    assert_eq!(take(&mut catalog, 1, &small), Ok(()));
    assert_eq!(take(&mut catalog, 2, &small), Ok(()));
    assert_eq!(take(&mut catalog, 1, &item(1, 1_000, None)), Err(Code::SizeDiffers));
    catalog.check();
}

#[test]
fn searches_spread_over_the_hosts_and_lean_towards_those_with_room() {
    let mut catalog = catalog(Limits::default(), 101);
    for member in 1..=100 {
        take(&mut catalog, member, &item(1, 1_000, None)).unwrap();
    }
    let busy = Load { uploads: 9, free_slots: 1, ..Load::default() };
    for member in 1..=10 {
        catalog.report(
            MemberNumber(member),
            peer(member),
            "10.1.1.1:1".parse().unwrap(),
            busy,
            true,
        );
    }
    let mut handed: BTreeMap<PeerId, u32> = BTreeMap::new();
    for _ in 0..50 {
        let found = catalog.search(asker(101), &search(Target::Id(id(1)), 16)).unwrap();
        assert_eq!((found.hosts.len(), found.hosts_in_all), (16, 100));
        assert!(found.hosts.is_sorted_by_key(|host| host.load), "the best first");
        let peers: BTreeSet<PeerId> = found.hosts.iter().map(|host| host.peer).collect();
        assert_eq!(peers.len(), 16, "none twice");
        for peer in peers {
            *handed.entry(peer).or_default() += 1;
        }
    }
    // 800 hand-outs: fair would be 8 each.
    let most = handed.values().max().unwrap();
    assert!(*most <= 16, "one host was handed out {most} times");
    assert!((11..=100).all(|member| handed.contains_key(&peer(member))), "nobody idle is left out");
    let of = |range: std::ops::RangeInclusive<u32>| -> f64 {
        let n = range.clone().count() as f64;
        let times = |member| f64::from(handed.get(&peer(member)).copied().unwrap_or(0));
        range.map(times).sum::<f64>() / n
    };
    assert!(of(1..=10) < 0.7 * of(11..=100), "busy {} idle {}", of(1..=10), of(11..=100));
}

#[test]
fn answers_mix_complete_hosts_and_partial_ones() {
    let mut catalog = catalog(Limits::default(), 240);
    for member in 1..=200 {
        take(&mut catalog, member, &item(1, 1_000, None)).unwrap();
    }
    for member in 201..=206 {
        take(&mut catalog, member, &item(1, 10, None)).unwrap();
    }
    for _ in 0..20 {
        let found = catalog.search(asker(240), &search(Target::Id(id(1)), 16)).unwrap();
        let partial = found.hosts.iter().filter(|host| host.held < HELD_ALL).count();
        assert_eq!((found.hosts.len(), partial), (16, 4));
    }
    // One seed among many beginners is in every answer.
    take(&mut catalog, 1, &item(2, 1_000, None)).unwrap();
    for member in 2..=200 {
        take(&mut catalog, member, &item(2, 0, None)).unwrap();
    }
    for _ in 0..20 {
        let found = catalog.search(asker(240), &search(Target::Id(id(2)), 16)).unwrap();
        assert!(found.hosts.len() == 16 && found.hosts.iter().any(|host| host.peer == peer(1)));
    }
    // Fewer than wanted: all but the asker.
    for member in [1, 2, 240] {
        take(&mut catalog, member, &item(3, 500, None)).unwrap();
    }
    let found = catalog.search(asker(240), &search(Target::Id(id(3)), 16)).unwrap();
    let peers: BTreeSet<PeerId> = found.hosts.iter().map(|host| host.peer).collect();
    assert_eq!(peers, [peer(1), peer(2)].into());
}

#[test]
fn hosts_on_loopback_are_handed_to_their_own_machine_only() {
    let mut catalog = catalog(Limits::default(), 4);
    catalog.report(MemberNumber(1), peer(1), "127.0.0.1:7".parse().unwrap(), ROOMY, true);
    take(&mut catalog, 1, &item(1, 1_000, None)).unwrap();
    let refusal = catalog.search(asker(4), &search(Target::Id(id(1)), 9)).unwrap_err();
    assert_eq!(refusal.code, Code::NoHosts);
    assert!(refusal.text.contains("index's machine"), "{}", refusal.text);
    let near = Asker { member: MemberNumber(4), loopback: true };
    assert_eq!(catalog.search(near, &search(Target::Id(id(1)), 9)).unwrap().hosts.len(), 1);
    take(&mut catalog, 2, &item(1, 1_000, None)).unwrap();
    let found = catalog.search(asker(4), &search(Target::Id(id(1)), 9)).unwrap();
    assert_eq!(found.hosts.iter().map(|host| host.peer).collect::<Vec<_>>(), [peer(2)]);
}

#[test]
fn a_content_with_a_hundred_thousand_hosts_is_searched_joined_and_left_like_any() {
    let mut catalog = catalog(Limits::default(), 0);
    for member in 1..=100_000u32 {
        let mut key = [0; 32];
        key[..4].copy_from_slice(&member.to_be_bytes());
        let address = SocketAddr::from(([10, 1, 0, 1], 1 + (member % 60_000) as u16));
        catalog.report(MemberNumber(member), PeerId(key), address, ROOMY, true);
        let held = if member % 10 == 0 { 1_000 } else { 500 };
        take(&mut catalog, member, &item(1, held, None)).unwrap();
    }
    for _ in 0..1_000 {
        let found = catalog.search(asker(77), &search(Target::Id(id(1)), 20)).unwrap();
        let peers: BTreeSet<PeerId> = found.hosts.iter().map(|host| host.peer).collect();
        assert_eq!((found.hosts.len(), peers.len()), (20, 20));
        assert!(found.hosts.iter().filter(|host| host.held == HELD_ALL).count() >= 2);
    }
    for member in (1..=100_000).step_by(3) {
        assert_eq!(catalog.evict(MemberNumber(member)), 1);
    }
    assert_eq!(catalog.counts().registrations, 100_000 - 33_334);
    catalog.check();
}

#[test]
fn a_glob_lists_names_and_ids_and_a_bad_one_says_why() {
    let mut catalog = catalog(Limits::default(), 1);
    for (n, text) in [(1, "llama-70b"), (2, "llama-8b"), (3, "größe")] {
        let mut named = record(0, 1, id(n), 1, 1);
        named.name = text.parse().unwrap();
        take(&mut catalog, 1, &item(n, 1_000, Some(named))).unwrap();
    }
    take(&mut catalog, 1, &item(0xab, 1_000, None)).unwrap();
    let list = |glob: &str| -> Vec<String> {
        let page = catalog.page(&Pattern::new(glob).unwrap(), None).page;
        assert!(!page.more);
        page.rows
            .iter()
            .map(|row| row.key.name.as_ref().map_or("-".into(), Name::to_string))
            .collect()
    };
    assert_eq!(list("*").len(), 4);
    assert_eq!(list("").len(), 4);
    assert_eq!(list("llama-*"), ["llama-70b", "llama-8b"]);
    assert_eq!(list("llama-?b"), ["llama-8b"]);
    assert_eq!(list("{größe,llama-70b}"), ["größe", "llama-70b"]);
    assert_eq!(list("*b"), ["llama-70b", "llama-8b"]);
    assert_eq!(list("abab*"), ["-"]);
    assert_eq!(list("llama"), Vec::<String>::new());
    assert!(Pattern::new("[a").unwrap_err().contains("glob"));
    assert!(Pattern::new(&"x".repeat(256)).is_err());
    assert!(Pattern::new(&"{".repeat(255)).is_err());
    let nested = format!("{}a{}", "{".repeat(120), "}".repeat(120));
    let _ = Pattern::new(&nested); // taken or refused, but no panic
}

#[test]
fn what_the_journal_kept_brings_everything_back() {
    let mut first = catalog(Limits::default(), 3);
    let mut naive = Naive::default();
    let ops = [
        Op::Register(1, item(1, 1_000, Some(record(0, 1, id(1), 1, 10)))),
        Op::Register(1, item(2, 1_000, Some(record(0, 2, id(2), 1, 20)))),
        Op::Register(2, item(1, 1_000, None)),
        Op::Register(2, item(3, 400, None)),
        Op::Register(3, item(4, 1_000, None)),
        Op::Withdraw(3, 4),
        Op::Round(3, [5].into()),
    ];
    for (at, op) in ops.iter().enumerate() {
        apply(&mut first, &mut naive, op, at as u32 + 1);
    }
    let mut rows: BTreeMap<(MemberNumber, ContentId), Hosted> = BTreeMap::new();
    let mut second = catalog(Limits::default(), 3);
    while let Some(durable) = first.poll_journal() {
        match durable {
            Durable::Hosted(member, id, hosted) => {
                rows.insert((member, id), hosted);
            }
            Durable::Dropped(member, id) => {
                assert!(rows.remove(&(member, id)).is_some());
            }
            Durable::Record(record) => second.restore_record(&record),
            Durable::Forgotten(..) => panic!("nothing was forgotten"),
        }
    }
    for ((member, id), hosted) in &rows {
        second.restore(*member, *id, hosted);
    }
    second.check();
    assert_eq!(second.listing(), first.listing());
    for member in 1..=3 {
        assert_eq!(second.digest(MemberNumber(member)), first.digest(MemberNumber(member)));
    }
    assert_eq!(second.poll_journal(), None, "what was restored is not saved again");
}

/// A thousand fetchers ask within a second for one content. How much more than the mean, by its
/// capacity, the busiest host is given; `turn_to` says which hosts a fetcher draws from, equally.
fn flash_crowd(capacities: &[u32], mut turn_to: impl FnMut(usize) -> Vec<usize>) -> f64 {
    let mut load = vec![0.0; capacities.len()];
    for nth in 0..FETCHERS {
        let hosts = turn_to(nth);
        hosts.iter().for_each(|host| load[*host] += 1.0 / hosts.len() as f64);
    }
    let mean = FETCHERS as f64 / capacities.iter().map(|c| f64::from(*c)).sum::<f64>();
    let by_capacity = load.iter().zip(capacities).map(|(load, c)| load / f64::from(*c));
    by_capacity.fold(0.0, f64::max) / mean
}

const FETCHERS: usize = 1_000;

/// A catalog with one content at hosts of these capacities in KiB/s, and what each says of itself.
fn crowded(capacities: &[u32], says: impl Fn(usize, u32) -> Load) -> Catalog {
    let mut catalog = Catalog::new(Limits::default(), 0, 5);
    for (nth, capacity) in capacities.iter().enumerate() {
        let (number, address) = (nth as u32 + 1, "10.1.1.1:1".parse().unwrap());
        catalog.report(MemberNumber(number), peer(number), address, says(nth, *capacity), true);
        take(&mut catalog, number, &item(1, 1_000, None)).unwrap();
    }
    catalog
}

/// The positions of the first hosts that the catalog tells one who asks.
fn told(catalog: &mut Catalog, first: usize) -> Vec<usize> {
    let found = catalog.search(asker(100_000), &search(Target::Id(id(1)), 20)).unwrap();
    found.hosts.iter().map(|host| usize::from(host.peer.0[0]) - 1).take(first).collect()
}

fn honest(capacity_kib: u32) -> Load {
    Load { uploads: 0, free_slots: 8, rate_kib: 0, capacity_kib }
}

#[test]
#[expect(clippy::print_stdout, reason = "figures for README, shown with --nocapture")]
fn a_flash_crowd_is_spread_over_hosts_by_what_they_can_carry() {
    let fifty: Vec<u32> = (0..50).map(|n| if n % 2 == 0 { 100_000 } else { 10_000 }).collect();
    let three = vec![100_000, 100_000, 10_000];
    for (capacities, draws_from) in [(&fifty, 1), (&fifty, 4), (&three, 1)] {
        let mut catalog = crowded(capacities, |_, capacity| honest(capacity));
        let ours = flash_crowd(capacities, |_| told(&mut catalog, draws_from));
        let (n, mut dice) = (capacities.len(), crate::dice::Dice(1));
        let any = |_| (0..draws_from).map(|_| dice.below(n as u64) as usize).collect();
        let random = flash_crowd(capacities, any);
        let in_turn = |nth| (0..draws_from).map(|i| (nth + i) % n).collect();
        let turns = flash_crowd(capacities, in_turn);
        println!("{n} hosts, {draws_from} each: {ours:.2}, random {random:.2}, in turn {turns:.2}");
        assert!(ours <= 1.25 && ours < random && ours < turns, "{ours} {random} {turns}");
    }
}

#[test]
fn a_host_that_lies_about_its_load_draws_a_bounded_share() {
    // One of fifty claims to be idle and as fast as a number can say, and says so all the time.
    let capacities = vec![10_000; 50];
    let liar = Load { uploads: 0, free_slots: u16::MAX, rate_kib: 0, capacity_kib: u32::MAX };
    let mut catalog = crowded(&capacities, |nth, c| if nth == 0 { liar } else { honest(c) });
    let mut drawn = vec![0; capacities.len()];
    for _ in 0..FETCHERS {
        let address = "10.1.1.1:1".parse().unwrap();
        catalog.report(MemberNumber(1), peer(1), address, liar, false);
        told(&mut catalog, 4).iter().for_each(|host| drawn[*host] += 1);
    }
    let all: i32 = drawn.iter().sum();
    assert!(drawn[0] * 5 < all, "it drew {} of {all}", drawn[0]);
    let rest = &drawn[1..];
    assert!(*rest.iter().max().unwrap() < 2 * rest.iter().min().unwrap(), "{rest:?}");
}

#[test]
#[expect(clippy::print_stdout, reason = "figures for README, shown with --nocapture")]
fn hosts_that_join_while_a_crowd_comes_take_their_part_and_are_not_mobbed() {
    // With every fiftieth fetcher one host more, as fast as the fast ones. A newcomer has had nobody yet,
    // so those who come next turn to it more than to others: the more so the fewer hosts each draws from.
    const NEW_EVERY: usize = 50;
    for (draws_from, most) in [(1, 3.0), (4, 2.0)] {
        let mut capacities: Vec<u32> =
            (0..50).map(|n| if n % 2 == 0 { 100_000 } else { 10_000 }).collect();
        let mut catalog = crowded(&capacities, |_, capacity| honest(capacity));
        let mut load = vec![0.0; 50];
        for nth in 0..FETCHERS {
            if nth % NEW_EVERY == NEW_EVERY - 1 {
                capacities.push(100_000);
                load.push(0.0);
                let (number, address) = (capacities.len() as u32, "10.1.1.1:1".parse().unwrap());
                catalog.report(MemberNumber(number), peer(number), address, honest(100_000), true);
                take(&mut catalog, number, &item(1, 1_000, None)).unwrap();
            }
            let hosts = told(&mut catalog, draws_from);
            hosts.iter().for_each(|host| load[*host] += 1.0 / hosts.len() as f64);
        }
        let mean = FETCHERS as f64 / capacities.iter().map(|c| f64::from(*c)).sum::<f64>();
        let of = |host: usize| load[host] / f64::from(capacities[host]) / mean;
        let busiest = |hosts: std::ops::Range<usize>| hosts.map(of).fold(0.0, f64::max);
        let (old, new) = (busiest(0..50), busiest(50..capacities.len()));
        println!("hosts join, {draws_from} each: {old:.2} of the old, {new:.2} of the new");
        assert!(old.max(new) <= most, "{old} {new}");
        assert!((50..60).all(|host| of(host) > 0.5), "a host that joined early has its part");
    }
}
