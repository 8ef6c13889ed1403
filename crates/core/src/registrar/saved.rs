//! Owns the rows in which an index's state outlives its process. Never writes them: the shell does,
//! in the order they come.

use std::net::SocketAddr;

use crate::catalog::{Durable, Hosted};
use crate::id::{ContentId, MemberNumber, Name, PeerId, Version};
use crate::time::WallTime;
use crate::trust::{NameRecord, RevocationList, Role};
use crate::wire::bytes::{Malformed, Reader, Writer};
use crate::wire::desk::InviteTerms;

use super::members::{Invited, Member};

/// Where a row belongs. Rows are handed back in the order of tables: later ones refer to earlier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Table {
    /// Secrets that session keys come from. Epoch number `u16` → secret 32, made `u64`.
    Epochs = 1,
    /// Number `u32` → peer 32, role, joined `u64`, invitation 8, removed `u64` or 0, label.
    Members = 2,
    /// Id 8 → secret 16, role, uses `u32`, expires `u64`, used `u32`, withdrawn.
    Invitations = 3,
    /// One row, keyed `revocations`: the signed list.
    Revocations = 4,
    /// Name, version `u32` → content, signed record.
    Names = 5,
    /// Member `u32` → address it serves at.
    Addresses = 6,
    /// Member `u32`, content → size `u64`, complete, name and version where there are.
    Registrations = 7,
}

impl Table {
    /// All tables, in the order in which they are handed back.
    pub const ALL: [Self; 7] = [
        Self::Epochs,
        Self::Members,
        Self::Invitations,
        Self::Revocations,
        Self::Names,
        Self::Addresses,
        Self::Registrations,
    ];

    /// What a store calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Epochs => "epochs",
            Self::Members => "members",
            Self::Invitations => "invitations",
            Self::Revocations => "revocations",
            Self::Names => "names",
            Self::Addresses => "addresses",
            Self::Registrations => "registrations",
        }
    }
}

/// One row to be written, or deleted where it has no value. Holds secrets: no `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Change {
    /// Where.
    pub table: Table,
    /// The row's key.
    pub key: Vec<u8>,
    /// The row; `None` deletes it.
    pub value: Option<Vec<u8>>,
}

/// A row that was read back.
pub(super) enum Saved {
    Epoch { number: u16, secret: [u8; 32], made: WallTime },
    Member(Member),
    Invitation([u8; 8], Invited),
    Revocations(RevocationList),
    Record(NameRecord),
    Address(MemberNumber, SocketAddr),
    Registration(MemberNumber, ContentId, Hosted),
}

pub(super) fn epoch(number: u16, content: Option<(&[u8; 32], WallTime)>) -> Change {
    let value = content.map(|(secret, made)| {
        let mut value = secret.to_vec();
        value.u64(made.0);
        value
    });
    Change { table: Table::Epochs, key: number.to_be_bytes().to_vec(), value }
}

pub(super) fn member(member: &Member) -> Change {
    let mut value = member.peer.0.to_vec();
    value.u8(member.role as u8);
    value.u64(member.joined.0);
    value.put(&member.invitation);
    value.u64(member.removed.map_or(0, |removed| removed.0.max(1)));
    value.text8(&member.label);
    Change {
        table: Table::Members,
        key: member.number.0.to_be_bytes().to_vec(),
        value: Some(value),
    }
}

pub(super) fn invitation(id: [u8; 8], invited: Option<&Invited>) -> Change {
    let value = invited.map(|invited| {
        let mut value = invited.secret.to_vec();
        value.u8(invited.terms.role as u8);
        value.u32(invited.terms.uses);
        value.u64(invited.terms.expires.0);
        value.u32(invited.used);
        value.u8(invited.withdrawn.into());
        value
    });
    Change { table: Table::Invitations, key: id.to_vec(), value }
}

pub(super) fn revocations(list: &RevocationList) -> Change {
    let mut value = vec![];
    list.write(&mut value);
    Change { table: Table::Revocations, key: b"revocations".to_vec(), value: Some(value) }
}

pub(super) fn address(member: MemberNumber, address: Option<SocketAddr>) -> Change {
    let value = address.map(|address| {
        let mut value = vec![];
        value.address(address);
        value
    });
    Change { table: Table::Addresses, key: member.0.to_be_bytes().to_vec(), value }
}

/// The row of something the catalog wants kept.
pub(super) fn durable(durable: Durable) -> Change {
    match durable {
        Durable::Hosted(member, id, hosted) => {
            let mut value = hosted.size.to_be_bytes().to_vec();
            value.u8(hosted.complete.into());
            if let Some((name, version)) = &hosted.named {
                value.text8(name.as_str());
                value.u32(version.0);
            }
            registration(member, id, Some(value))
        }
        Durable::Dropped(member, id) => registration(member, id, None),
        Durable::Record(record) => {
            let mut value = vec![];
            value.content(&record.id);
            record.write(&mut value);
            name(&record.name, record.version, Some(value))
        }
        Durable::Forgotten(name_, version) => name(&name_, version, None),
    }
}

fn registration(member: MemberNumber, id: ContentId, value: Option<Vec<u8>>) -> Change {
    let mut key = member.0.to_be_bytes().to_vec();
    key.content(&id);
    Change { table: Table::Registrations, key, value }
}

fn name(name: &Name, version: Version, value: Option<Vec<u8>>) -> Change {
    let mut key = vec![];
    key.text8(name.as_str());
    key.u32(version.0);
    Change { table: Table::Names, key, value }
}

/// Reads a row back.
pub(super) fn read(table: Table, key: &[u8], value: &[u8]) -> Result<Saved, Malformed> {
    let (mut k, mut v) = (Reader::new(key), Reader::new(value));
    let saved = match table {
        Table::Epochs => {
            let (number, secret) = (k.u16()?, v.array()?);
            Saved::Epoch { number, secret, made: WallTime(v.u64()?) }
        }
        Table::Members => Saved::Member(Member {
            number: MemberNumber(k.u32()?),
            peer: PeerId(v.array()?),
            role: Role::from_byte(v.u8()?)?,
            joined: WallTime(v.u64()?),
            invitation: v.array()?,
            removed: Some(v.u64()?).filter(|time| *time > 0).map(WallTime),
            label: v.text8()?.to_owned(),
        }),
        Table::Invitations => {
            let (id, secret) = (k.array()?, v.array()?);
            let (role, uses) = (Role::from_byte(v.u8()?)?, v.u32()?);
            let terms = InviteTerms { role, uses, expires: WallTime(v.u64()?) };
            Saved::Invitation(
                id,
                Invited { secret, terms, used: v.u32()?, withdrawn: v.u8()? != 0 },
            )
        }
        Table::Revocations => {
            k.take_rest();
            Saved::Revocations(RevocationList::read(&mut v)?)
        }
        Table::Names => {
            k.take_rest();
            let id = v.content()?;
            Saved::Record(NameRecord::read(&mut v, id)?)
        }
        Table::Addresses => Saved::Address(MemberNumber(k.u32()?), v.address()?),
        Table::Registrations => {
            let (member, id) = (MemberNumber(k.u32()?), k.content()?);
            let (size, complete) = (v.u64()?, v.u8()? != 0);
            let named = if v.rest().is_empty() { None } else { Some((v.name()?, v.version()?)) };
            Saved::Registration(member, id, Hosted { size, complete, named })
        }
    };
    k.end()?;
    v.end()?;
    Ok(saved)
}
