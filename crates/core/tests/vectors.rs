//! Owns the test vectors at the end of PROTOCOL.md: whatever stands there is what is computed here.

#![expect(clippy::unwrap_used, reason = "what cannot be made or read fails the test")]

use std::fmt::Write;

use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use data_encoding::HEXLOWER;
use potluck_core::id::{ContentId, MemberNumber, PeerId, RequestId, Version};
use potluck_core::seal::{
    EpochSecret, ReplyHead, RequestHead, WIRE_VERSION, seal_reply, seal_request,
};
use potluck_core::time::WallTime;
use potluck_core::trust::{Invitation, MachineKey, NameRecord, invitation_id, join_tag};
use potluck_core::wire::bytes::Writer;
use potluck_core::wire::datagram::{
    Ack, HELD_ALL, Item, Reply, Request, Search, Target, digest_of,
};

#[test]
fn the_vectors_in_the_protocol_document_are_what_is_computed() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../PROTOCOL.md");
    let document = std::fs::read_to_string(path).unwrap();
    let words: Vec<&str> = document.split_whitespace().collect();
    let words = words.join(" ");
    let mut computed = String::new();
    for (name, value) in trust().into_iter().chain(datagrams()).chain(contents()) {
        writeln!(computed, "{name:<28}{value}").unwrap();
    }
    for line in computed.lines() {
        let line: Vec<&str> = line.split_whitespace().collect();
        assert!(words.contains(&line.join(" ")), "the document does not say:\n{computed}");
    }
}

type Vectors = Vec<(&'static str, String)>;

fn hex(bytes: impl AsRef<[u8]>) -> String {
    HEXLOWER.encode(bytes.as_ref())
}

/// Long values stand in the document in lines of 32 bytes.
fn hex_lines(bytes: &[u8]) -> String {
    let lines: Vec<String> = bytes.chunks(32).map(hex).collect();
    lines.join(" ")
}

fn index() -> MachineKey {
    MachineKey::from_seed([1; 32])
}

fn machine() -> MachineKey {
    MachineKey::from_seed([2; 32])
}

fn trust() -> Vectors {
    let secret = [9; 16];
    let addresses = vec!["192.168.100.200:7700".to_owned()];
    let until = WallTime(1_800_000_000);
    let invitation = Invitation::new(index().network(), secret, until, addresses);
    vec![
        ("network key", hex(index().public())),
        ("machine key", hex(machine().public())),
        ("network hash", hex(invitation.network_hash)),
        ("invitation", invitation.to_string()),
        ("invitation id", hex(invitation_id(&secret))),
        ("join tag", hex(join_tag(&secret, &[10; 32], machine().peer()))),
    ]
}

fn datagrams() -> Vectors {
    let (epoch, member, salt) = (20_000, MemberNumber(7), 0x0102_0304_0506_0708);
    let keys = EpochSecret([3; 32]).session(index().network(), member, salt);
    let boot = 5;
    let id = RequestId(0x1122_3344_5566_7788);
    let request = Request::Deregister(vec![]);
    let head =
        RequestHead { kind: request.kind(), epoch, member, salt, counter: 1, cookie: [0; 16] };
    let sealed = seal_request(&keys.to_index, &head, &request.encode(id));
    let reply = Reply::Ack(Ack::Deregistered);
    let head = ReplyHead {
        kind: reply.kind(),
        epoch,
        member,
        salt,
        counter: 2,
        boot,
        revocations: 3,
        flags: 0,
    };
    assert_eq!(WIRE_VERSION, 1);
    let answer = seal_reply(&keys.reply_key(boot), &head, &reply.encode(id));
    let file = ContentId::file([0; 32]);
    let named = NameRecord::sign(
        &machine(),
        index().network(),
        "game".parse().unwrap(),
        Version(2),
        file,
        WallTime(1_800_000_000),
    );
    let item = Item { id: file, size: 1 << 30, held: HELD_ALL, name: Some(named.clone()) };
    let both =
        digest_of(&item).wrapping_add(digest_of(&Item { name: None, size: 5, ..item.clone() }));
    let avoid = vec![PeerId([0xbb; 32])];
    let search = Request::Search(Search { target: Target::Id(file), hosts: 20, avoid });
    vec![
        ("search", hex_lines(&search.encode(id))),
        ("key to index", hex(keys.to_index)),
        ("key from index", hex(keys.from_index)),
        ("reply key", hex(keys.reply_key(boot))),
        ("sealed request", hex_lines(&sealed)),
        ("sealed reply", hex_lines(&answer)),
        ("record signature", hex_lines(&named.signature)),
        ("digest of one", hex(digest_of(&item).to_le_bytes())),
        ("digest of two", hex(both.to_le_bytes())),
    ]
}

fn contents() -> Vectors {
    let bytes: Vec<u8> = (0..150_000u32).map(|i| (i % 251) as u8).collect();
    let values: Vec<[u8; 32]> = bytes
        .chunks(64 << 10)
        .zip(0..)
        .map(|(piece, n)| {
            let mut hasher = blake3::Hasher::new();
            hasher.set_input_offset(n * (64 << 10));
            hasher.update(piece).finalize_non_root()
        })
        .collect();
    let left = merge_subtrees_non_root(&values[0], &values[1], Mode::Hash);
    let file = merge_subtrees_root(&left, &values[2], Mode::Hash);
    assert_eq!(file, blake3::hash(&bytes));
    let mut manifest = b"potluck manifest v1\n".to_vec();
    manifest.u8(0);
    manifest.bytes16(b"a/b.txt");
    manifest.u64(150_000);
    manifest.put(file.as_bytes());
    manifest.u8(2);
    manifest.bytes16(b"c");
    let folder = ContentId::folder(*blake3::hash(&manifest).as_bytes());
    vec![
        ("value of piece 0", hex(values[0])),
        ("value of piece 1", hex(values[1])),
        ("value of piece 2", hex(values[2])),
        ("file id", ContentId::file(*file.as_bytes()).to_string()),
        ("manifest", hex_lines(&manifest)),
        ("folder id", folder.to_string()),
    ]
}
