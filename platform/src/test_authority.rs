//! Certificates for tests, of an authority that a test makes.

use std::{
    fs,
    path::{Path, PathBuf},
};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use time::{Duration, OffsetDateTime};

pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, both in PEM.
pub(crate) struct Signed {
    pub(crate) cert: String,
    pub(crate) key: String,
}

/// Valid from and until so many days from now.
pub(crate) type Days = (i64, i64);

pub(crate) const GOOD: Days = (-1, 10);
pub(crate) const EXPIRED: Days = (-10, -1);

impl Authority {
    pub(crate) fn new(days: Days) -> Authority {
        let mut params = params("authority", Vec::new(), days);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Authority(CertifiedIssuer::self_signed(params, key).unwrap())
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate for this machine whose first name is `name`.
    pub(crate) fn sign(&self, name: &str, days: Days) -> Signed {
        let names = vec![name.to_owned(), "127.0.0.1".to_owned()];
        let key = KeyPair::generate().unwrap();
        let cert = params(name, names, days).signed_by(&key, &self.0).unwrap();
        Signed {
            cert: cert.pem(),
            key: key.serialize_pem(),
        }
    }
}

fn params(name: &str, alternative: Vec<String>, (from, until): Days) -> CertificateParams {
    let mut params = CertificateParams::new(alternative).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = OffsetDateTime::now_utc() + Duration::days(from);
    params.not_after = OffsetDateTime::now_utc() + Duration::days(until);
    params
}

/// `cert.pem`, `key.pem` and `ca.pem` in a folder.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn of(authority: &Authority, signed: &Signed) -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        folder.write("ca.pem", &authority.pem());
        folder.show(signed);
        folder
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        Path::new(self.0.path()).join(file)
    }

    pub(crate) fn write(&self, file: &str, text: &str) {
        fs::write(self.path(file), text).unwrap();
    }

    pub(crate) fn show(&self, signed: &Signed) {
        self.write("cert.pem", &signed.cert);
        self.write("key.pem", &signed.key);
    }
}
