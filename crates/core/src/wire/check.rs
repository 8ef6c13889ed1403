//! Owns what must hold for any bytes whatever, one function a format. Fuzzing, the replay of the
//! corpus and the property tests all call these; each says whether the bytes were understood.
//! Each panics when what was understood is not written back byte for byte.

use super::bytes::Reader;
use super::datagram::{Notice, Reply, Request};
use super::desk::{Answer, Ask, Membership};
use super::stream::Frame;
use crate::id::ContentId;
use crate::seal::{ReplyHead, RequestHead};
use crate::trust::{Certificate, Invitation, NameRecord, RevocationList};

/// A datagram as it lies open: its letter, then the plaintext. Also read as a sealed one's head.
pub fn datagram(input: &[u8]) -> bool {
    let _ = (RequestHead::decode(input), ReplyHead::decode(input));
    let Some((&kind, plaintext)) = input.split_first() else { return false };
    if let Ok((id, request)) = Request::decode(kind, plaintext) {
        let written = request.encode(id);
        let padding = plaintext.strip_prefix(&written[..]);
        assert!(padding.is_some_and(|p| p.iter().all(|byte| *byte == 0)), "{request:?}");
        assert_eq!(Request::decode(kind, &written), Ok((id, request)));
        return true;
    }
    if let Ok((to, reply)) = Reply::decode(kind, plaintext) {
        assert_eq!(reply.encode(to), plaintext, "{reply:?}");
        return true;
    }
    if let Ok(notice) = Notice::decode(plaintext)
        && kind == b'N'
    {
        assert_eq!(notice.encode(), plaintext, "{notice:?}");
        return true;
    }
    false
}

/// A frame of the desk without its length: a question, an answer, or a kept membership.
pub fn desk(input: &[u8]) -> bool {
    let ask = Ask::decode(input).map(|ask| ask.encode());
    let answer = Answer::decode(input).map(|answer| answer.encode());
    let membership = Membership::decode(input).map(|membership| membership.encode());
    let written: Vec<_> = [ask, answer, membership].into_iter().flatten().collect();
    assert!(written.iter().all(|bytes| bytes == input), "a frame of the desk has two forms");
    !written.is_empty()
}

/// A frame between peers without its length. Who read it and writes it again is the other side, so
/// the bit that says whose channel it is turns over.
pub fn stream(input: &[u8]) -> bool {
    let Ok(frame) = Frame::decode(input) else { return false };
    let mut written = vec![];
    frame.encode(&mut written);
    if !matches!(frame, Frame::Hello { .. } | Frame::Ping | Frame::Bye(..)) {
        written[5] ^= 0x80;
    }
    assert_eq!(written[..4], (input.len() as u32).to_be_bytes());
    assert!(written[4..] == *input, "{frame:?}");
    true
}

/// An invitation's text, a certificate, a name record (of the file with a hash of zeroes) or a
/// revocation list.
pub fn trust(input: &[u8]) -> bool {
    if let Some(invitation) = std::str::from_utf8(input).ok().and_then(|t| t.parse().ok()) {
        let text = Invitation::to_string(&invitation);
        assert_eq!(text.parse(), Ok(invitation));
        return true;
    }
    if let Ok(certificate) = Certificate::decode(input) {
        let (network, peer, from) = (certificate.network, certificate.peer, certificate.not_before);
        let _ = certificate.check(network, peer, from);
        assert_eq!(certificate.encode(), input, "{certificate:?}");
        return true;
    }
    let mut r = Reader::new(input);
    if let Ok(record) = NameRecord::read(&mut r, ContentId::file([0; 32]))
        && r.end().is_ok()
    {
        let mut written = vec![];
        record.write(&mut written);
        assert_eq!(written, input, "{record:?}");
        return true;
    }
    let mut r = Reader::new(input);
    if let Ok(list) = RevocationList::read(&mut r)
        && r.end().is_ok()
    {
        let mut written = vec![];
        list.write(&mut written);
        assert_eq!(written, input, "{list:?}");
        return true;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::arbitrary::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_have_one_form(
            kind in proptest::sample::select(&b"RSOTWAEN"[..]),
            first in 0u8..20,
            bytes in vec(any::<u8>(), 0..400),
        ) {
            datagram(&[&[kind], &bytes[..]].concat());
            for check in [stream, desk] {
                check(&[&[first], &bytes[..]].concat());
                check(&[&[first | 0x80], &bytes[..]].concat());
            }
            trust(&bytes);
        }

        #[test]
        fn bent_certificates_records_and_lists_are_refused_or_have_one_form(
            certificate in bent(certificate().prop_map(|c| c.encode())),
            record in bent(record().prop_map(|record| {
                let mut out = vec![];
                record.write(&mut out);
                out
            })),
            list in bent(revocations().prop_map(|list| {
                let mut out = vec![];
                list.write(&mut out);
                out
            })),
        ) {
            trust(&certificate);
            trust(&record);
            trust(&list);
        }
    }
}
