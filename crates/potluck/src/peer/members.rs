//! Owns what a peer that is an admin asks of the index's desk about other members: invitations, the
//! list of members, removal. Never decides whether it may (the index does).

use std::time::Duration;

use data_encoding::{HEXLOWER, HEXLOWER_PERMISSIVE};
use potluck_core::id::PeerId;
use potluck_core::trust::{Invitation, Role};
use potluck_core::wire::desk::{Answer, Ask, Member, Removal};

use super::Replies;
use super::engine::Engine;
use super::network::no_network;
use crate::control::{self, Event};
use crate::desk::{self, Expect};
use crate::error::{Error, ErrorKind, Result};
use crate::index::invite_terms;

/// How long the index's desk may take.
const DESK_PATIENCE: Duration = Duration::from_secs(6);

impl Engine {
    pub(super) fn invite(&mut self, uses: u32, valid_s: u64, role: &str, replies: Replies) {
        let role = match role.parse::<Role>() {
            Ok(role) => role,
            Err(e) => return replies.fail(&Error::new(ErrorKind::Usage, e.0)),
        };
        let Some(line) = &self.line else { return replies.fail(&no_network()) };
        let (network, index) = (line.membership.network, line.membership.index.clone());
        let terms = invite_terms(role, uses, Duration::from_secs(valid_s));
        self.at_desk(Ask::Invite(terms), replies, move |answer| match answer {
            Answer::Invited { secret, terms } => {
                let invitation = Invitation::new(network, *secret, terms.expires, index);
                Some(invited_event(&invitation, terms.uses, valid_s, role))
            }
            _ => None,
        });
    }

    pub(super) fn remove_member(&mut self, who: String, replies: Replies) {
        match removal(&who) {
            Some(Ok(removal)) => self.at_desk(Ask::Remove(removal), replies, removed_event),
            Some(Err(e)) => replies.fail(&e),
            // A label or the beginning of an id: the list of members tells whose.
            None => self.desk_job(Ask::Members, replies, move |engine, replies, answer| {
                let Answer::Members(members) = answer else {
                    return replies.fail(&desk::unexpected());
                };
                match pick_member(&members, &who) {
                    Ok(peer) => {
                        let ask = Ask::Remove(Removal::Peer(peer));
                        engine.at_desk(ask, replies, removed_event);
                    }
                    Err(e) => replies.fail(&e),
                }
            }),
        }
    }

    pub(super) fn at_desk(
        &mut self,
        ask: Ask,
        replies: Replies,
        event: impl FnOnce(&Answer) -> Option<Event> + Send + 'static,
    ) {
        self.desk_job(ask, replies, move |_, replies, answer| match event(&answer) {
            Some(event) => replies.tell(event),
            None => replies.fail(&desk::unexpected()),
        });
    }

    fn desk_job(
        &mut self,
        ask: Ask,
        replies: Replies,
        then: impl FnOnce(&mut Self, Replies, Answer) + Send + 'static,
    ) {
        let Some(line) = &self.line else { return replies.fail(&no_network()) };
        let (key, network) = (self.key.clone(), line.membership.network);
        let index = line.membership.index.clone();
        self.job(
            move || {
                desk::ask(&key, &index, Expect::Pinned(network), |_, _| ask, DESK_PATIENCE)
                    .map(|(_, answer, _)| answer)
            },
            move |engine, result| match result {
                Ok(Answer::Refused(refusal)) => replies.fail(&desk::refused(&refusal)),
                Ok(answer) => then(engine, replies, answer),
                Err(e) => replies.fail(&e),
            },
        );
    }
}

/// The members, as an event.
pub(crate) fn members_event(members: &[Member]) -> Event {
    let members = members.iter().map(|m| control::Member {
        peer: m.peer.to_string(),
        label: m.label.clone(),
        role: m.role.to_string(),
        joined: m.joined.0,
        invitation: HEXLOWER.encode(&m.invitation),
        silent_s: m.silent_s,
    });
    Event::Members { members: members.collect() }
}

/// An invitation, as an event.
pub(crate) fn invited_event(invitation: &Invitation, uses: u32, valid_s: u64, role: Role) -> Event {
    Event::Invited {
        invite: invitation.to_string(),
        id: HEXLOWER.encode(&invitation.id()),
        uses,
        valid_s,
        role: role.to_string(),
    }
}

fn removed_event(answer: &Answer) -> Option<Event> {
    match answer {
        Answer::Removed(count) => Some(Event::Removed { count: *count }),
        _ => None,
    }
}

/// `invitation:ID` or a whole machine id; `None` for anything else.
pub(crate) fn removal(who: &str) -> Option<Result<Removal>> {
    if let Some(id) = who.strip_prefix("invitation:") {
        let id = HEXLOWER_PERMISSIVE.decode(id.as_bytes()).ok();
        let id = id.and_then(|bytes| <[u8; 8]>::try_from(bytes).ok());
        let error = || {
            Error::new(
                ErrorKind::Usage,
                "an invitation's id is 16 hexadecimal digits (see potluck members)",
            )
        };
        return Some(id.map(Removal::Invitation).ok_or_else(error));
    }
    who.parse::<PeerId>().ok().map(|peer| Ok(Removal::Peer(peer)))
}

/// The one member with this label, or whose id begins so.
pub(crate) fn pick_member(members: &[Member], who: &str) -> Result<PeerId> {
    let fits =
        |m: &&Member| m.label == who || m.peer.to_string().starts_with(&who.to_ascii_lowercase());
    let found: Vec<_> = members.iter().filter(fits).collect();
    match found[..] {
        [one] => Ok(one.peer),
        [] => Err(Error::new(
            ErrorKind::NotFound,
            format!("no member is called {who}, or has an id that begins so"),
        )
        .hint("potluck members lists them")),
        _ => Err(Error::new(ErrorKind::Usage, format!("{who} fits {} members", found.len()))
            .hint("say more of the id; potluck members lists them")),
    }
}
