//! Owns the two cursors all formats are read and written with. Never panics on what it reads.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::id::{ContentId, Kind, Name, Version};

/// Bytes that are not the format they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed: {0}")]
pub struct Malformed(pub &'static str);

/// Reads a format from its front to its end.
#[derive(Clone, Debug)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Begins at the first byte.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// What was not read yet.
    pub const fn rest(&self) -> &'a [u8] {
        self.0
    }

    /// All that is left, as bytes.
    pub fn take_rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    /// The next `n` bytes.
    pub fn take(&mut self, n: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self.0.split_at_checked(n).ok_or(Malformed("it ends too early"))?;
        self.0 = rest;
        Ok(head)
    }

    /// The next `N` bytes as an array.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(Malformed("it ends too early"))?;
        self.0 = rest;
        Ok(*head)
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }

    /// Two bytes, big-endian.
    pub fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    /// Four bytes, big-endian.
    pub fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    /// Eight bytes, big-endian.
    pub fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// A length byte and so many bytes.
    pub fn bytes8(&mut self) -> Result<&'a [u8], Malformed> {
        let n = self.u8()?;
        self.take(n.into())
    }

    /// A two-byte length and so many bytes.
    pub fn bytes16(&mut self) -> Result<&'a [u8], Malformed> {
        let n = self.u16()?;
        self.take(n.into())
    }

    /// A length byte and UTF-8 text without control characters.
    pub fn text8(&mut self) -> Result<&'a str, Malformed> {
        let text = std::str::from_utf8(self.bytes8()?).map_err(|_| Malformed("text is not UTF-8"))?;
        if text.chars().any(crate::id::is_deceptive) {
            return Err(Malformed("text holds control characters"));
        }
        Ok(text)
    }

    /// A content id: kind byte (0 file, 1 folder), 32 bytes of hash.
    pub fn content(&mut self) -> Result<ContentId, Malformed> {
        let kind = match self.u8()? {
            0 => Kind::File,
            1 => Kind::Folder,
            _ => return Err(Malformed("a content is a file or a folder")),
        };
        Ok(ContentId { kind, hash: self.array()? })
    }

    /// A name, length byte first.
    pub fn name(&mut self) -> Result<Name, Malformed> {
        let text = self.text8()?;
        let name: Name = text.parse().map_err(|_| Malformed("not a name"))?;
        if name.as_str() != text {
            return Err(Malformed("a name is not in its normal form"));
        }
        Ok(name)
    }

    /// A version: four bytes, not zero.
    pub fn version(&mut self) -> Result<Version, Malformed> {
        match self.u32()? {
            0 => Err(Malformed("a version counts from 1")),
            n => Ok(Version(n)),
        }
    }

    /// An address: family byte (4, 6), address, port.
    pub fn address(&mut self) -> Result<SocketAddr, Malformed> {
        let ip: IpAddr = match self.u8()? {
            4 => Ipv4Addr::from(self.array::<4>()?).into(),
            6 => Ipv6Addr::from(self.array::<16>()?).into(),
            _ => return Err(Malformed("an address is IPv4 or IPv6")),
        };
        Ok(SocketAddr::new(ip, self.u16()?))
    }

    /// Nothing may be left.
    pub fn end(&self) -> Result<(), Malformed> {
        if self.0.is_empty() { Ok(()) } else { Err(Malformed("it goes on after its end")) }
    }
}

/// Writes a format to the end of a byte vector; the mirror of [`Reader`].
pub trait Writer {
    /// One byte.
    fn u8(&mut self, n: u8);
    /// Raw bytes.
    fn put(&mut self, bytes: &[u8]);
    /// Two bytes, big-endian.
    fn u16(&mut self, n: u16) {
        self.put(&n.to_be_bytes());
    }
    /// Four bytes, big-endian.
    fn u32(&mut self, n: u32) {
        self.put(&n.to_be_bytes());
    }
    /// Eight bytes, big-endian.
    fn u64(&mut self, n: u64) {
        self.put(&n.to_be_bytes());
    }
    /// A length byte and at most 255 bytes (longer ones are cut: callers hold the limit).
    fn bytes8(&mut self, bytes: &[u8]) {
        let bytes = &bytes[..bytes.len().min(255)];
        self.u8(bytes.len() as u8);
        self.put(bytes);
    }
    /// A two-byte length and at most 65,535 bytes.
    fn bytes16(&mut self, bytes: &[u8]) {
        let bytes = &bytes[..bytes.len().min(usize::from(u16::MAX))];
        self.u16(bytes.len() as u16);
        self.put(bytes);
    }
    /// Text, cut at a character to at most 255 bytes.
    fn text8(&mut self, text: &str) {
        let mut end = text.len().min(255);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.bytes8(&text.as_bytes()[..end]);
    }
    /// A content id.
    fn content(&mut self, id: &ContentId) {
        self.u8(match id.kind {
            Kind::File => 0,
            Kind::Folder => 1,
        });
        self.put(&id.hash);
    }
    /// An address.
    fn address(&mut self, address: SocketAddr) {
        match address.ip().to_canonical() {
            IpAddr::V4(ip) => {
                self.u8(4);
                self.put(&ip.octets());
            }
            IpAddr::V6(ip) => {
                self.u8(6);
                self.put(&ip.octets());
            }
        }
        self.u16(address.port());
    }
}

impl Writer for Vec<u8> {
    fn u8(&mut self, n: u8) {
        self.push(n);
    }
    fn put(&mut self, bytes: &[u8]) {
        self.extend_from_slice(bytes);
    }
}
