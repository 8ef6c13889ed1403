//! Owns what a TLS identity is here: a raw Ed25519 public key (RFC 7250), on both sides, under TLS
//! 1.3 and nothing older. Never decides who is a member: it proves which key the other side holds.
//!
//! No certificate authorities, no names, no tickets: every connection is proved anew.

use std::sync::Arc;

use potluck_core::trust::{self, MachineKey};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::{CertifiedKey, Signer, SigningKey};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error,
    PeerMisbehaved, ServerConfig, SignatureAlgorithm, SignatureScheme,
};

/// The protocol name (ALPN) between peers.
pub(crate) const PEERS: &[u8] = b"potluck/1";
/// The protocol name (ALPN) at the index's desk.
pub(crate) const DESK: &[u8] = b"potluck-desk/1";

/// What a `SubjectPublicKeyInfo` of an Ed25519 key begins with (RFC 8410); 32 bytes of key follow.
const SPKI_HEAD: [u8; 12] =
    [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// Whose key the other side must show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expect {
    /// Any Ed25519 key: the caller looks at it afterwards ([`key_of`]).
    Anyone,
    /// This one.
    Key([u8; 32]),
    /// One whose BLAKE3 begins with these bytes (how an invitation names its network).
    Hash([u8; 16]),
}

/// Terms for connecting, showing `key`, to somebody who must be `expect`.
pub(crate) fn client(key: &MachineKey, expect: Expect, alpn: &[u8]) -> Result<ClientConfig, Error> {
    client_with(provider(), key, expect, alpn)
}

/// The same with other algorithms.
pub(crate) fn client_with(
    provider: CryptoProvider,
    key: &MachineKey,
    expect: Expect,
    alpn: &[u8],
) -> Result<ClientConfig, Error> {
    let mut config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS13])?
        .dangerous() // the dangerous thing: not X.509, but a verifier of our own
        .with_custom_certificate_verifier(Arc::new(Verifier { expect }))
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(shown(key))));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    config.enable_secret_extraction = true; // connections protect their records themselves
    Ok(config)
}

/// Terms for being connected to, showing `key`, by anyone who shows a key.
pub(crate) fn server(key: &MachineKey, alpn: &[u8]) -> Result<ServerConfig, Error> {
    server_with(provider(), key, alpn)
}

/// The same with other algorithms.
pub(crate) fn server_with(
    provider: CryptoProvider,
    key: &MachineKey,
    alpn: &[u8],
) -> Result<ServerConfig, Error> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(Verifier { expect: Expect::Anyone }))
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(shown(key))));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.enable_secret_extraction = true; // as above
    Ok(config)
}

/// The name rustls wants for a server; never sent and never looked at.
pub(crate) fn no_name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into())
}

/// The key the other side proved to hold, from what a finished handshake collected.
pub(crate) fn key_of(shown: Option<&[CertificateDer<'_>]>) -> Option<[u8; 32]> {
    match shown {
        Some([only]) => parse(only).ok(),
        _ => None,
    }
}

/// Whether a handshake failed because the other side holds another key than expected.
pub(crate) fn is_wrong_key(error: &Error) -> bool {
    *error == Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
}

/// AES-128-GCM first: on every machine with AES instructions it is the fastest of the three.
pub(crate) fn provider() -> CryptoProvider {
    use aws_lc_rs::{cipher_suite as suite, kx_group as group};
    CryptoProvider {
        cipher_suites: vec![
            suite::TLS13_AES_128_GCM_SHA256,
            suite::TLS13_AES_256_GCM_SHA384,
            suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        // The hybrid first: what is recorded today stays closed to tomorrow's quantum computers.
        kx_groups: vec![group::X25519MLKEM768, group::X25519],
        ..aws_lc_rs::default_provider()
    }
}

/// `key` as rustls shows it.
fn shown(key: &MachineKey) -> Arc<CertifiedKey> {
    let signer = KeySigner(Arc::new(MachineKey::from_seed(*key.seed())));
    Arc::new(CertifiedKey::new(vec![spki(&key.public()).into()], Arc::new(signer)))
}

/// The terms of somebody who shows another's key, and signs with his own.
#[cfg(test)]
pub(crate) fn pretending(
    key: &MachineKey,
    to_be: [u8; 32],
    alpn: &[u8],
) -> Result<ServerConfig, Error> {
    #[derive(Debug)]
    struct Pretender(KeySigner, [u8; 32]);
    impl SigningKey for Pretender {
        fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
            self.0.choose_scheme(offered)
        }
        fn public_key(&self) -> Option<SubjectPublicKeyInfoDer<'_>> {
            Some(spki(&self.1).into())
        }
        fn algorithm(&self) -> SignatureAlgorithm {
            self.0.algorithm()
        }
    }
    let signer = KeySigner(Arc::new(MachineKey::from_seed(*key.seed())));
    let shown = CertifiedKey::new(vec![spki(&to_be).into()], Arc::new(Pretender(signer, to_be)));
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(Verifier { expect: Expect::Anyone }))
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(Arc::new(shown))));
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(config)
}

fn spki(key: &[u8; 32]) -> Vec<u8> {
    [&SPKI_HEAD[..], key].concat()
}

/// The key in a raw public key: exactly the 44 bytes an Ed25519 key has, nothing else.
fn parse(spki: &[u8]) -> Result<[u8; 32], Error> {
    spki.strip_prefix(&SPKI_HEAD)
        .and_then(|key| key.try_into().ok())
        .ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))
}

/// The one verifier, for both sides.
#[derive(Debug)]
struct Verifier {
    expect: Expect,
}

impl Verifier {
    fn look(&self, shown: &[u8], further: &[CertificateDer<'_>]) -> Result<(), Error> {
        let key = parse(shown)?;
        let believed = match self.expect {
            Expect::Anyone => true,
            Expect::Key(expected) => key == expected,
            Expect::Hash(hash) => blake3::hash(&key).as_bytes().starts_with(&hash),
        };
        if believed && further.is_empty() {
            Ok(())
        } else {
            Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
        }
    }

    fn signature(
        message: &[u8],
        shown: &[u8],
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let key = parse(shown)?;
        let bad = Error::InvalidCertificate(CertificateError::BadSignature);
        if signed.scheme != SignatureScheme::ED25519 {
            return Err(bad);
        }
        let signature = signed.signature().try_into().map_err(|_| bad.clone())?;
        if trust::verify(&key, message, &signature) {
            Ok(HandshakeSignatureValid::assertion())
        } else {
            Err(bad)
        }
    }

    /// TLS 1.2 is not offered, so nobody asks.
    fn no_tls12() -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerMisbehaved(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme))
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.look(end_entity, intermediates).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.look(end_entity, intermediates).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// Signs handshakes with a machine's key.
#[derive(Clone, Debug)]
struct KeySigner(Arc<MachineKey>);

impl SigningKey for KeySigner {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn Signer>> {
        offered
            .contains(&SignatureScheme::ED25519)
            .then(|| Box::new(self.clone()) as Box<dyn Signer>)
    }

    fn public_key(&self) -> Option<SubjectPublicKeyInfoDer<'_>> {
        Some(spki(&self.0.public()).into())
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        SignatureAlgorithm::ED25519
    }
}

impl Signer for KeySigner {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Error> {
        Ok(self.0.sign(message).to_vec())
    }

    fn scheme(&self) -> SignatureScheme {
        SignatureScheme::ED25519
    }
}
