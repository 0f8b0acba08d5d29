//! The other end of a connection: the names in the certificate that it has shown and the handshake has verified.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use rustls::pki_types::CertificateDer;
use x509_parser::{extensions::GeneralName, prelude::FromDer as _};

use crate::line::Line;

/// Bytes of a name in a log line: an authority may write longer ones than anybody reads.
const SHOWN: usize = 128;

/// An extension of every request. Without a certificate it has no names and is not verified.
#[derive(Clone, Default)]
pub struct Peer {
    names: Option<Arc<[String]>>,
    line: Option<Arc<Line>>,
    has_no_roles: bool,
}

impl Peer {
    /// The peer whose certificate the handshake has verified.
    pub(crate) fn of(certificate: Option<&CertificateDer<'_>>) -> Peer {
        Peer {
            names: certificate.map(|certificate| names(certificate).into()),
            line: None,
            has_no_roles: false,
        }
    }

    /// The same, over a port whose callers have no role.
    pub(crate) fn without_roles(self) -> Peer {
        Peer {
            has_no_roles: true,
            ..self
        }
    }

    /// Whether it has not even the roles of everybody.
    pub(crate) fn has_no_roles(&self) -> bool {
        self.has_no_roles
    }

    /// The same, over a connection of a server.
    pub(crate) fn over(self, line: Arc<Line>) -> Peer {
        Peer {
            line: Some(line),
            ..self
        }
    }

    /// Whether it has shown a certificate.
    pub fn is_verified(&self) -> bool {
        self.names.is_some()
    }

    /// DNS and URI names in the order of the certificate, or its common name when it has no alternative names at all.
    pub(crate) fn names(&self) -> &[String] {
        self.names.as_deref().unwrap_or_default()
    }

    pub(crate) fn line(&self) -> Option<&Arc<Line>> {
        self.line.as_ref()
    }
}

/// Tells one peer from another: the connections of one certificate, or one connection without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PeerId(u64);

impl PeerId {
    /// What belongs to no call.
    pub(crate) const NONE: PeerId = PeerId(0);

    /// A new one.
    pub(crate) fn unused() -> PeerId {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        PeerId(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Whether the caller has shown a certificate that the handshake has verified (`tls.client_auth`).
pub fn is_authenticated<T>(request: &tonic::Request<T>) -> bool {
    let peer = request.extensions().get::<Peer>();
    peer.is_some_and(Peer::is_verified)
}

/// Who calls, for a log line: the name that has the role where roles are configured, else the certificate's first.
pub fn caller<T>(request: &tonic::Request<T>) -> String {
    let extensions = request.extensions();
    if let Some(Caller(name)) = extensions.get::<Caller>() {
        return shown(name).to_owned();
    }
    let peer = extensions.get::<Peer>().filter(|peer| peer.is_verified());
    let name = match peer {
        None => "unauthenticated",
        Some(peer) => peer.names().first().map_or("unnamed", String::as_str),
    };
    shown(name).to_owned()
}

/// The name by which a call was let in, an extension of its request.
#[derive(Clone, Debug)]
pub(crate) struct Caller(pub(crate) String);

fn shown(name: &str) -> &str {
    name.split_at_checked(SHOWN)
        .map_or(name, |(shown, _)| shown)
}

/// A certificate that cannot be read has no names: whoever shows it is verified, and has no role.
fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, certificate)) = x509_parser::certificate::X509Certificate::from_der(certificate)
    else {
        return Vec::new();
    };
    match certificate.subject_alternative_name() {
        Ok(Some(alternative)) => alternative
            .value
            .general_names
            .iter()
            .filter_map(|name| match name {
                GeneralName::DNSName(name) | GeneralName::URI(name) => Some((*name).to_owned()),
                _ => None,
            })
            .collect(),
        Ok(None) => common_name(certificate.subject()).into_iter().collect(),
        // twice, or malformed
        Err(_) => Vec::new(),
    }
}

/// Of two common names neither is the name.
fn common_name(subject: &x509_parser::x509::X509Name<'_>) -> Option<String> {
    let mut names = subject.iter_common_name();
    let name = names.next()?.as_str().ok()?;
    names.next().is_none().then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, SanType};

    use super::*;

    fn peer(common: &[&str], alternative: Vec<SanType>) -> Peer {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for name in common {
            params.distinguished_name.push(DnType::CommonName, *name);
        }
        params.subject_alt_names = alternative;
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        Peer::of(Some(certificate.der()))
    }

    fn dns(name: &str) -> SanType {
        SanType::DnsName(name.try_into().unwrap())
    }

    fn uri(name: &str) -> SanType {
        SanType::URI(name.try_into().unwrap())
    }

    #[test]
    fn names_are_the_alternative_ones_and_the_common_one_only_without() {
        let shop = uri("spiffe://shop/checkout");
        let both = peer(&["operator"], vec![dns("checkout"), shop]);
        assert_eq!(both.names(), ["checkout", "spiffe://shop/checkout"]);
        assert_eq!(peer(&["operator"], Vec::new()).names(), ["operator"]);

        // an address is an alternative name, and none that a role can have
        let address = SanType::IpAddress([127, 0, 0, 1].into());
        let mail = SanType::Rfc822Name("operator".try_into().unwrap());
        let unnamed = peer(&["operator"], vec![address, mail]);
        assert!(unnamed.is_verified() && unnamed.names().is_empty());
        assert!(peer(&[], Vec::new()).names().is_empty());
    }

    #[test]
    fn nothing_shown_and_nothing_readable_have_no_name() {
        assert!(!Peer::of(None).is_verified());
        let garbage = Peer::of(Some(&CertificateDer::from(vec![0x30, 0x03, 1, 2, 3])));
        assert!(garbage.is_verified() && garbage.names().is_empty());
    }

    #[test]
    fn a_log_line_has_a_name_of_bounded_length() {
        let mut request = tonic::Request::new(());
        assert_eq!(caller(&request), "unauthenticated");
        let long = uri(&format!("urn:{}", "x".repeat(500)));
        request.extensions_mut().insert(peer(&[], vec![long]));
        assert_eq!(caller(&request).len(), SHOWN);
        request.extensions_mut().insert(peer(&[], Vec::new()));
        assert_eq!(caller(&request), "unnamed");
        request.extensions_mut().insert(Caller("gateway".into()));
        assert_eq!(caller(&request), "gateway");
    }
}
