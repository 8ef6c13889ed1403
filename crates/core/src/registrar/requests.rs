//! Owns what becomes of a request that proved to be a member's: whether it is answered, in which order, and
//! with what. Never looks at a tag (the gate did), and never remembers more of a member than its seat holds.

use std::net::SocketAddr;

use crate::catalog::{Asker, Pattern, refuse};
use crate::id::{MemberNumber, PeerId, RequestId};
use crate::seal::ReplyHead;
use crate::time::{Duration, Moment};
use crate::trust::{NameRecord, Role};
use crate::wire::datagram::{
    Ack, Code, HEAD_BYTES, Item, List, Refusal, Register, Registered, Reply, Request, Search,
    TAG_BYTES,
};

use super::gate::{Line, Opened};
use super::pace::{SIGNATURE_TOKENS, Turn};
use super::{Dropped, Registrar, Settings};

/// Rows looked at for a list that cost as much as one request.
const ROWS_A_TOKEN: usize = 256;

impl Registrar {
    /// Answers a datagram that is authentic.
    pub(super) fn heed(
        &mut self,
        now: Moment,
        opened: &Opened<'_>,
        order: (u64, u64),
    ) -> Result<(), Dropped> {
        let Opened { line, kind, proven, length, plaintext, .. } = opened;
        let (kind, length) = (*kind, *length);
        let (id, _) = plaintext.split_first_chunk::<8>().ok_or(Dropped::Malformed)?;
        let id = RequestId(u64::from_be_bytes(*id));
        let Settings { requests_a_second, burst, .. } = self.settings;
        let turn = self.seat(line.member).pace.take(now, requests_a_second, burst);
        if let Turn::Refused(until) | Turn::PassedOver(until) = turn {
            self.too_fast.push((line.member, until));
        }
        if let Turn::PassedOver(_) = turn {
            return Err(Dropped::TooFast);
        }
        if self.roster.member(line.member).is_none_or(|member| member.removed.is_some()) {
            let refusal = refuse(Code::Removed, "this machine was removed from the network");
            if *proven {
                self.reply(line, kind, id, &Reply::Error(refusal));
            } else {
                self.refuse_short(line, kind, id, refusal, length);
            }
            return Ok(());
        }
        if !proven {
            let cookie = Some(self.jar.bake(now, line.from, line.member));
            let refusal = Refusal { code: Code::CookieNeeded, text: String::new(), cookie };
            self.refuse_short(line, kind, id, refusal, length);
            return Ok(());
        }
        self.seat(line.member).heard = Some(now);
        let done = if turn != Turn::Granted {
            Err(refuse(Code::TooFast, "too many requests: wait a second"))
        } else if self.epochs.ends_soon(line.epoch, now) {
            Err(refuse(Code::SessionOver, "fetch new keys"))
        } else {
            match Request::decode(kind, plaintext) {
                Ok((_, request)) => {
                    self.keep_order(line.member, order, &request)?;
                    self.act(now, line, request)
                }
                Err(malformed) => Err(refuse(Code::BadRequest, malformed.to_string())),
            }
        };
        self.reply(line, kind, id, &done.map_or_else(Reply::Error, Reply::Ack));
        self.settle(line.member);
        self.watchers.note(now, self.catalog.sequence());
        Ok(())
    }

    /// Refuses a change of what a member hosts or watches that a later one of it has overtaken.
    fn keep_order(
        &mut self,
        member: MemberNumber,
        order: (u64, u64),
        request: &Request,
    ) -> Result<(), Dropped> {
        let seat = self.seat(member);
        let last = match request {
            Request::Register(said) if said.items.is_empty() && !said.round_ends => return Ok(()),
            Request::Register(_) | Request::Deregister(_) => &mut seat.hosts_order,
            Request::Watch(_) => &mut seat.watch_order,
            Request::Search(_) | Request::List(_) => return Ok(()), // these change nothing
        };
        if order < *last {
            return Err(Dropped::Overtaken);
        }
        *last = order;
        Ok(())
    }

    fn act(&mut self, now: Moment, line: &Line, request: Request) -> Result<Ack, Refusal> {
        match request {
            Request::Register(register) => self.register(now, line, &register).map(Ack::Registered),
            Request::Search(search) => self.search(now, line, &search),
            Request::List(list) => self.list(line, &list),
            Request::Deregister(ids) => {
                for id in &ids {
                    self.catalog.withdraw(line.member, id);
                }
                Ok(Ack::Deregistered)
            }
            Request::Watch(watch) => self.watch(now, line, &watch).map(Ack::Watching),
        }
    }

    fn register(
        &mut self,
        now: Moment,
        line: &Line,
        said: &Register,
    ) -> Result<Registered, Refusal> {
        let number = line.member;
        let Some(member) = self.roster.member(number) else {
            return Err(refuse(Code::Removed, "this machine was removed from the network"));
        };
        let (peer, role) = (member.peer, member.role);
        if said.port == 0 && !said.items.is_empty() {
            return Err(refuse(Code::BadRequest, "a host serves on a port: 0 is none"));
        }
        let hosts = self.catalog.hosted_by(number) > 0;
        if said.port != 0 && (hosts || !said.items.is_empty()) {
            let address = SocketAddr::new(line.from.ip().to_canonical(), said.port);
            let heartbeat = Duration::from_secs(self.settings.heartbeat_s.into());
            let seat = self.seat(number);
            let due = seat.reported.is_none_or(|at| now.since(at) >= heartbeat / 2);
            if due {
                seat.reported = Some(now);
            }
            self.catalog.report(number, peer, address, said.load, due);
        }
        if said.round != 0 && (said.round_ends || !said.items.is_empty()) {
            self.catalog.enter_round(number, said.round); // heartbeats may come late, and begin none
        }
        let mut refused = vec![];
        for (position, item) in said.items.iter().enumerate() {
            if let Err(refusal) = self.register_item(number, peer, role, item) {
                *self.stats.items_refused.entry(refusal.code).or_default() += 1;
                refused.push((position as u8, refusal));
            }
        }
        if said.round_ends {
            self.catalog.end_round(number, said.round);
        }
        self.renew(number, now + self.lease());
        let theirs = u128::from_le_bytes(said.digest);
        let ours = self.catalog.digest(number);
        let seat = self.seat(number);
        seat.vague &= !said.round_ends;
        let repeat_all = theirs != 0 && (theirs != ours || seat.vague);
        self.stats.repeats += u64::from(repeat_all);
        let lease_s = self.lease().as_secs().min(u64::from(u16::MAX)) as u16;
        let heartbeat_s = self.settings.heartbeat_s.max(1);
        Ok(Registered { lease_s, heartbeat_s, repeat_all, refused })
    }

    fn register_item(
        &mut self,
        number: MemberNumber,
        peer: PeerId,
        role: Role,
        item: &Item,
    ) -> Result<(), Refusal> {
        if role == Role::Read && !self.catalog.knows(&item.id) && !self.is_relayed(peer, item) {
            return Err(refuse(Code::NotAllowed, "your role may not publish new contents"));
        }
        if role == Role::Read
            && let Some(record) = &item.name
            && record.publisher == peer
            && !self.catalog.has_record(record)
        {
            return Err(refuse(Code::NotAllowed, "your role may not publish names"));
        }
        let known = self.catalog.hosts_it(number, &item.id)
            && item.name.as_ref().is_none_or(|record| self.catalog.has_record(record));
        if !known && self.is_full() {
            return Err(refuse(Code::Full, "the index's memory is full"));
        }
        let network = self.network;
        let mut verified = false;
        let done = self.catalog.register(number, item, |record: &NameRecord| {
            verified = true;
            record.check(network).is_ok()
        });
        if verified {
            self.seat(number).pace.charge(SIGNATURE_TOKENS);
        }
        done
    }

    /// Whether `item` brings along the record of another that may publish: what a machine that only
    /// reads may introduce, so that an index that lost its file finds it again.
    fn is_relayed(&self, peer: PeerId, item: &Item) -> bool {
        item.name.as_ref().is_some_and(|record| {
            let publisher = self.roster.member_with(record.publisher);
            record.publisher != peer && publisher.is_some_and(|p| p.role >= Role::Publish)
        })
    }

    fn search(&mut self, now: Moment, line: &Line, search: &Search) -> Result<Ack, Refusal> {
        for peer in &search.avoid {
            let host = self.roster.member_with(*peer).map(|member| member.number);
            let host = host.filter(|h| *h != line.member && self.catalog.hosted_by(*h) > 0);
            if let Some(host) = host {
                self.blames.add(now, host, line.member);
                self.catalog.sink(host, self.blames.sinks(host));
            }
        }
        let loopback = line.from.ip().to_canonical().is_loopback();
        self.catalog.search(Asker { member: line.member, loopback }, search).map(Ack::Found)
    }

    fn list(&mut self, line: &Line, list: &List) -> Result<Ack, Refusal> {
        let pattern = Pattern::new(&list.glob).map_err(|text| refuse(Code::BadRequest, text))?;
        let scan = self.catalog.page(&pattern, list.after.as_ref());
        self.seat(line.member).pace.charge((scan.looked_at / ROWS_A_TOKEN) as i64);
        Ok(Ack::Page(scan.page))
    }

    /// Answers one whose address is not proven: always with less than it sent, if need be without
    /// the text for people.
    fn refuse_short(
        &mut self,
        line: &Line,
        kind: u8,
        id: RequestId,
        mut refusal: Refusal,
        length: usize,
    ) {
        let sealed = |refusal: &Refusal| {
            HEAD_BYTES + TAG_BYTES + Reply::Error(refusal.clone()).encode(id).len()
        };
        if sealed(&refusal) >= length {
            refusal.text.clear();
        }
        if sealed(&refusal) < length {
            self.reply(line, kind, id, &Reply::Error(refusal));
        }
    }

    fn reply(&mut self, line: &Line, asked: u8, id: RequestId, reply: &Reply) {
        let code = match reply {
            Reply::Ack(_) => None,
            Reply::Error(refusal) => Some(refusal.code),
        };
        *self.stats.requests.entry((char::from(asked), code)).or_default() += 1;
        self.send(line, reply.kind(), |out| reply.write(id, out));
    }

    pub(super) fn send(&mut self, line: &Line, kind: u8, write: impl FnOnce(&mut Vec<u8>)) {
        let head = ReplyHead {
            kind,
            epoch: line.epoch,
            member: line.member,
            salt: line.salt,
            counter: self.nonce,
            boot: self.boot,
            revocations: self.roster.revocations().version,
            flags: 0,
        };
        self.nonce += 1;
        self.outbox.push(line, &head, write);
    }
}
