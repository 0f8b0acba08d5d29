//! Development certificates: one authority of our own, a certificate for each service, and one for each role that a caller from
//! outside may have. The authority's key is thrown away as soon as it has signed, so that nobody can make more of what a developer's machine trusts.

use std::{
    fs,
    io::Write as _,
    net::IpAddr,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};
use rustls::{
    RootCertStore, ServerConfig,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier as _},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use time::{Duration, OffsetDateTime};

use crate::failure::Misuse;

/// Who gets a certificate; the name is also a DNS name in it.
pub const SERVERS: [&str; 4] = ["checkout", "loms", "notifications", "products"];
/// Shown by whoever may do what only the shop itself may, `ReceiveStock`.
pub const OPERATOR: &str = "operator";
/// Shown by whoever speaks for users.
pub const GATEWAY: &str = "gateway";
/// Shown by whoever only looks.
pub const READER: &str = "reader";
/// Callers that older sets know nothing of: the key that would add them was thrown away.
const ADDED: [&str; 2] = [GATEWAY, READER];
/// Apple's clients refuse server certificates that live longer than 825 days.
const LIFETIME: Duration = Duration::days(800);

/// What [`ensure`] found or did.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    Written,
    Kept,
}

/// The authority's certificate in `dir`.
pub fn ca(dir: &Path) -> PathBuf {
    dir.join("ca.pem")
}

/// The certificate of a server, or of a caller, in `dir`.
pub fn cert(dir: &Path, owner: &str) -> PathBuf {
    dir.join(format!("{owner}.pem"))
}

/// Its key.
pub fn key(dir: &Path, owner: &str) -> PathBuf {
    dir.join(format!("{owner}-key.pem"))
}

/// Everybody who gets a certificate.
pub fn owners() -> impl Iterator<Item = &'static str> {
    SERVERS.into_iter().chain([OPERATOR]).chain(ADDED)
}

fn is_server(owner: &str) -> bool {
    SERVERS.contains(&owner)
}

/// Those of whom `dir` must have a certificate.
fn expected(dir: &Path, layout: Layout) -> impl Iterator<Item = &'static str> {
    let is_there = move |owner| {
        let dir = layout.folder(dir, owner);
        cert(&dir, owner).exists() || key(&dir, owner).exists()
    };
    owners().filter(move |owner| !ADDED.contains(owner) || is_there(owner))
}

/// How a set lies in its folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// All of it, in one folder.
    Together,
    /// A folder for each owner, by its name, with the authority and the owner's certificate and key: what is mounted into
    /// its container and no other.
    Apart,
}

impl Layout {
    fn folder(self, dir: &Path, owner: &str) -> PathBuf {
        match self {
            Layout::Together => dir.to_owned(),
            Layout::Apart => dir.join(owner),
        }
    }
}

/// Writes a set where there is none, keeps one that is valid, refuses to touch one that is not, unless `force`.
pub fn ensure(dir: &Path, layout: Layout, force: bool) -> Result<Outcome> {
    let files = owners().flat_map(|owner| {
        let folder = layout.folder(dir, owner);
        [ca(&folder), cert(&folder, owner), key(&folder, owner)]
    });
    if force || files.into_iter().all(|file| !file.exists()) {
        write(dir, layout)?;
        return Ok(Outcome::Written);
    }
    verify(dir, layout).map_err(|error| {
        let apart = match layout {
            Layout::Together => "",
            Layout::Apart => " --apart",
        };
        let remedy = format!(
            "correct it, or write a new set with `devstack certs --force{apart} --dir {}`",
            dir.display()
        );
        Misuse::error(format!("{error:#}"), remedy)
    })?;
    Ok(Outcome::Kept)
}

/// Writes a new authority and new certificates over whatever is there.
pub fn write(dir: &Path, layout: Layout) -> Result<()> {
    Authority::new()?.write(dir, layout)
}

/// Signs as long as it is kept.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    /// One of its own.
    pub fn new() -> Result<Authority> {
        let issuer = CertifiedIssuer::self_signed(authority()?, KeyPair::generate()?)?;
        Ok(Authority(issuer))
    }

    /// Writes its certificate and one for each owner.
    pub fn write(&self, dir: &Path, layout: Layout) -> Result<()> {
        for owner in owners() {
            let dir = &layout.folder(dir, owner);
            fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
            write_file(&ca(dir), &self.0.pem(), 0o644)?;
            self.sign(dir, owner, &params(owner)?)?;
        }
        Ok(())
    }

    /// Writes a certificate and its key, named after `owner`.
    pub fn sign(&self, dir: &Path, owner: &str, params: &CertificateParams) -> Result<()> {
        let key_pair = KeyPair::generate()?;
        let signed = params.signed_by(&key_pair, &self.0)?;
        write_file(&cert(dir, owner), &signed.pem(), 0o644)?;
        write_file(&key(dir, owner), &key_pair.serialize_pem(), 0o600)
    }
}

/// Whether every certificate is there, within its time, signed by one authority for every name, and fits its key.
pub fn verify(dir: &Path, layout: Layout) -> Result<()> {
    let mut authorities = expected(dir, layout).map(|owner| ca(&layout.folder(dir, owner)));
    let first = authorities.next().context("a set has owners")?;
    let root = read_cert(&first)?;
    for other in authorities {
        anyhow::ensure!(
            read_cert(&other)? == root,
            "{} is another authority than {}",
            other.display(),
            first.display()
        );
    }
    let mut roots = RootCertStore::empty();
    roots
        .add(root)
        .with_context(|| format!("{} is no authority", first.display()))?;
    let (roots, provider) = (
        Arc::new(roots),
        Arc::new(rustls::crypto::ring::default_provider()),
    );
    let verifier =
        WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone()).build()?;
    let caller = WebPkiClientVerifier::builder_with_provider(roots, provider.clone()).build()?;
    for owner in expected(dir, layout) {
        let dir = &layout.folder(dir, owner);
        let shown = cert(dir, owner).display().to_string();
        let certificate = read_cert(&cert(dir, owner))?;
        caller
            .verify_client_cert(&certificate, &[], UnixTime::now())
            .with_context(|| format!("{shown} cannot be shown by a caller"))?;
        let names = is_server(owner).then(|| names(owner));
        for name in names.into_iter().flatten() {
            let name = ServerName::try_from(name).context("server name")?;
            verifier
                .verify_server_cert(&certificate, &[], &name, &[], UnixTime::now())
                .with_context(|| {
                    format!(
                        "{shown} does not stand for {name:?} under {}",
                        ca(dir).display()
                    )
                })?;
        }
        let file = key(dir, owner);
        let private = PrivateKeyDer::from_pem_file(&file)
            .with_context(|| format!("read {}", file.display()))?;
        ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![certificate], private)
            .with_context(|| format!("{} does not fit {shown}", file.display()))?;
    }
    Ok(())
}

fn read_cert(file: &Path) -> Result<CertificateDer<'static>> {
    CertificateDer::from_pem_file(file).with_context(|| format!("read {}", file.display()))
}

/// The first is its own: logs show that one.
fn names(server: &str) -> [String; 3] {
    [
        server.to_owned(),
        "localhost".to_owned(),
        IpAddr::from([127, 0, 0, 1]).to_string(),
    ]
}

fn authority() -> Result<CertificateParams> {
    let mut params = named("marketplace development authority", Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

/// What its certificate says of an owner.
pub fn params(owner: &str) -> Result<CertificateParams> {
    let names = match is_server(owner) {
        true => names(owner).to_vec(),
        false => vec![owner.to_owned()],
    };
    let mut params = named(owner, names)?;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // a service is also a caller: with both purposes it can show who it is when a neighbour asks
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    if is_server(owner) {
        params
            .extended_key_usages
            .push(ExtendedKeyUsagePurpose::ServerAuth);
    }
    Ok(params)
}

fn named(name: &str, alternatives: Vec<String>) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(alternatives)?;
    params.distinguished_name.push(DnType::CommonName, name);
    // clocks of containers may be behind
    params.not_before = OffsetDateTime::now_utc() - Duration::days(1);
    params.not_after = OffsetDateTime::now_utc() + LIFETIME;
    Ok(params)
}

fn write_file(file: &Path, text: &str, mode: u32) -> Result<()> {
    let shown = file.display();
    let opened = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(file);
    let mut opened = opened.map_err(|error| {
        Misuse::error(
            format!("writing {shown}: {error}"),
            "make the folder writable",
        )
    })?;
    // a file that was there keeps its mode otherwise
    opened.set_permissions(fs::Permissions::from_mode(mode))?;
    opened
        .write_all(text.as_bytes())
        .with_context(|| format!("write {shown}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_valid_set_is_kept_and_a_broken_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            ensure(dir.path(), Layout::Together, false).unwrap(),
            Outcome::Written
        );
        let first = fs::read(cert(dir.path(), "loms")).unwrap();
        assert_eq!(
            ensure(dir.path(), Layout::Together, false).unwrap(),
            Outcome::Kept
        );
        assert_eq!(fs::read(cert(dir.path(), "loms")).unwrap(), first);

        fs::copy(key(dir.path(), "checkout"), key(dir.path(), "loms")).unwrap();
        let error = ensure(dir.path(), Layout::Together, false).unwrap_err();
        assert!(
            error.is::<Misuse>() && error.to_string().contains("loms-key.pem"),
            "{error}"
        );
        assert_eq!(
            ensure(dir.path(), Layout::Together, true).unwrap(),
            Outcome::Written
        );
        verify(dir.path(), Layout::Together).unwrap();

        fs::remove_file(cert(dir.path(), "products")).unwrap();
        assert!(
            ensure(dir.path(), Layout::Together, false)
                .unwrap_err()
                .to_string()
                .contains("products.pem")
        );
    }

    #[test]
    fn a_set_from_before_there_were_more_callers_is_valid() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), Layout::Together).unwrap();
        for owner in ADDED {
            fs::remove_file(cert(dir.path(), owner)).unwrap();
            let error = verify(dir.path(), Layout::Together).unwrap_err();
            assert!(format!("{error:#}").contains(owner), "{error:#}");
            fs::remove_file(key(dir.path(), owner)).unwrap();
        }
        assert_eq!(
            ensure(dir.path(), Layout::Together, false).unwrap(),
            Outcome::Kept
        );
    }

    #[test]
    fn keys_are_for_their_owner_only() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(key(dir.path(), "loms"), "left by someone").unwrap();
        write(dir.path(), Layout::Together).unwrap();
        for owner in owners() {
            let mode = fs::metadata(key(dir.path(), owner))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600, "{owner}");
        }
    }

    #[test]
    fn an_owner_has_a_folder_with_its_own_key_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let ensure = |force| ensure(dir.path(), Layout::Apart, force);
        assert_eq!(ensure(false).unwrap(), Outcome::Written);
        assert_eq!(ensure(false).unwrap(), Outcome::Kept);
        for owner in owners() {
            let found = fs::read_dir(dir.path().join(owner)).unwrap();
            let mut found: Vec<_> = found
                .map(|file| file.unwrap().file_name().into_string().unwrap())
                .collect();
            found.sort();
            let mut own = [
                "ca.pem".to_owned(),
                format!("{owner}-key.pem"),
                format!("{owner}.pem"),
            ];
            own.sort();
            assert_eq!(found, own, "{owner}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), owners().count());

        // a folder of another set: its pair is whole, and nobody would believe it
        let other = tempfile::tempdir().unwrap();
        write(other.path(), Layout::Apart).unwrap();
        for file in fs::read_dir(other.path().join("loms")).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), dir.path().join("loms").join(file.file_name())).unwrap();
        }
        let error = ensure(false).unwrap_err().to_string();
        assert!(error.contains("loms/ca.pem"), "{error}");
        assert!(error.contains("--force --apart"), "{error}");
        assert_eq!(ensure(true).unwrap(), Outcome::Written);
        verify(dir.path(), Layout::Apart).unwrap();
    }
}
