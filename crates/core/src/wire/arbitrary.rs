//! Owns the strategies that tests of all formats share: arbitrary ids, names, texts, addresses.

use std::net::SocketAddr;

use proptest::collection::vec;
use proptest::prelude::*;

use super::bytes::MAX_CONTENT;
use crate::id::{ContentId, Kind, MemberNumber, Name, NetworkId, PeerId, Piece, Version};
use crate::layout::MAX_PIECES;
use crate::time::WallTime;
use crate::trust::{Certificate, MAX_LABEL, NameRecord, RevocationList, Role};

pub(crate) fn peer() -> impl Strategy<Value = PeerId> {
    any::<[u8; 32]>().prop_map(PeerId)
}

pub(crate) fn content() -> impl Strategy<Value = ContentId> {
    (any::<bool>(), any::<[u8; 32]>()).prop_map(|(folder, hash)| ContentId {
        kind: if folder { Kind::Folder } else { Kind::File },
        hash,
    })
}

pub(crate) fn size() -> impl Strategy<Value = u64> {
    prop_oneof![0..100u64, 0..=MAX_CONTENT, Just(MAX_CONTENT)]
}

pub(crate) fn version() -> impl Strategy<Value = Version> {
    (1..=u32::MAX).prop_map(Version)
}

pub(crate) fn piece() -> impl Strategy<Value = Piece> {
    (0..MAX_PIECES).prop_map(Piece)
}

pub(crate) fn time() -> impl Strategy<Value = WallTime> {
    any::<u64>().prop_map(WallTime)
}

/// Text without control characters of at most `most` bytes.
pub(crate) fn text(most: usize) -> impl Strategy<Value = String> {
    vec(prop_oneof![4 => proptest::char::range(' ', '~'), 1 => any::<char>()], 0..=most).prop_map(
        move |chars| {
            let mut text: String =
                chars.into_iter().filter(|c| !crate::id::is_deceptive(*c)).collect();
            text.truncate(text.floor_char_boundary(most));
            text
        },
    )
}

/// What a machine may be called.
pub(crate) fn label() -> impl Strategy<Value = String> {
    text(MAX_LABEL).prop_map(|text| crate::trust::clean_label(&text))
}

pub(crate) fn name() -> impl Strategy<Value = Name> {
    prop_oneof![
        8 => "[a-z0-9][a-z0-9._-]{0,20}",
        1 => "[a-z]{255}",
        1 => Just("größe 日本語".to_owned()),
    ]
    .prop_map(|text| text.parse().unwrap())
}

pub(crate) fn signature() -> impl Strategy<Value = [u8; 64]> {
    any::<([u8; 32], [u8; 32])>().prop_map(|(a, b)| std::array::from_fn(|i| [a, b][i / 32][i % 32]))
}

pub(crate) fn record() -> impl Strategy<Value = NameRecord> {
    (name(), version(), content(), peer(), time(), signature()).prop_map(
        |(name, version, id, publisher, time, signature)| NameRecord {
            name,
            version,
            id,
            publisher,
            time,
            signature,
        },
    )
}

pub(crate) fn role() -> impl Strategy<Value = Role> {
    proptest::sample::select(&[Role::Read, Role::Publish, Role::Admin][..])
}

pub(crate) fn certificate() -> impl Strategy<Value = Certificate> {
    (peer(), peer(), any::<u32>(), role(), (time(), time()), label(), signature()).prop_map(
        |(network, peer, member, role, (not_before, not_after), label, signature)| Certificate {
            network: NetworkId(network.0),
            peer,
            member: MemberNumber(member),
            role,
            not_before,
            not_after,
            label,
            signature,
        },
    )
}

pub(crate) fn revocations() -> impl Strategy<Value = RevocationList> {
    (any::<u32>(), proptest::collection::btree_set(peer(), 0..20), signature())
        .prop_map(|(version, peers, signature)| RevocationList { version, peers, signature })
}

pub(crate) fn address() -> impl Strategy<Value = SocketAddr> {
    prop_oneof![
        any::<([u8; 4], u16)>().prop_map(SocketAddr::from),
        any::<([u8; 16], u16)>().prop_map(|(ip, port)| {
            SocketAddr::new(std::net::IpAddr::from(ip).to_canonical(), port)
        }),
    ]
}

/// Bytes that are nearly a format: written well, then changed, cut or lengthened in a few places.
pub(crate) fn bent(good: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = Vec<u8>> {
    let change = (0u8..6, any::<prop::sample::Index>(), prop_oneof![0u8..4, any::<u8>()]);
    (good, vec(change, 0..4)).prop_map(|(mut bytes, changes)| {
        for (how, at, byte) in changes {
            let at = at.index(bytes.len() + 1);
            match how {
                0 => bytes.truncate(at),
                1 => bytes.insert(at, byte),
                2 => bytes.push(byte),
                _ if at < bytes.len() => bytes[at] = byte,
                _ => {}
            }
        }
        bytes
    })
}
