//! Certificates in files: read and judged at start, and again when the files change. What replaces them must be as good; until
//! it is, what was read before stays in use.

use std::{
    collections::HashMap,
    fs,
    path::PathBuf,
    sync::{Arc, LazyLock, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use prometheus::{GaugeVec, Opts};
use rustls::{
    RootCertStore,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    sign::CertifiedKey,
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};

use crate::{error::StartError, grpc::registered, tasks::Tasks};

/// A file, and the setting that names it.
#[derive(Clone, Debug)]
pub(crate) struct PemFile {
    pub(crate) setting: &'static str,
    pub(crate) path: PathBuf,
}

/// The files of one side of TLS: what it shows, and what it verifies the other side with.
#[derive(Clone, Debug, Default)]
pub(crate) struct Files {
    /// Certificate and key.
    pub(crate) identity: Option<(PemFile, PemFile)>,
    pub(crate) ca: Option<PemFile>,
}

/// What is in them.
pub(crate) struct Loaded {
    pub(crate) identity: Option<Arc<CertifiedKey>>,
    pub(crate) roots: Option<Arc<RootCertStore>>,
    /// Seconds since 1970, by file.
    expiries: Vec<(PathBuf, i64)>,
}

/// What is wrong with a file, by its name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Wrong(String);

impl Wrong {
    fn of(file: &PemFile, cause: impl std::fmt::Display) -> Wrong {
        Wrong(format!("{} {} {cause}", file.setting, file.path.display()))
    }
}

/// The bytes of the files, in the order of [`Files::all`].
type Contents = Vec<Vec<u8>>;

impl Files {
    fn all(&self) -> impl Iterator<Item = &PemFile> {
        let identity = self.identity.iter().flat_map(|(cert, key)| [cert, key]);
        identity.chain(&self.ca)
    }

    fn read(&self) -> Result<Contents, Wrong> {
        let read = |file: &PemFile| {
            fs::read(&file.path).map_err(|error| {
                let (setting, path) = (file.setting, file.path.display());
                Wrong(format!("reading {setting} {path}: {error}"))
            })
        };
        self.all().map(read).collect()
    }

    fn judge(&self, contents: &Contents, now: i64) -> Result<Loaded, Wrong> {
        let mut contents = contents.iter();
        let mut next = || contents.next().map_or(&[][..], Vec::as_slice);
        let mut loaded = Loaded {
            identity: None,
            roots: None,
            expiries: Vec::new(),
        };
        if let Some((cert, key)) = &self.identity {
            let chain = certificates(cert, next())?;
            loaded
                .expiries
                .push((cert.path.clone(), expiry(cert, &chain, now)?));
            loaded.identity = Some(Arc::new(identity(cert, chain, key, next())?));
        }
        if let Some(ca) = &self.ca {
            let chain = certificates(ca, next())?;
            loaded
                .expiries
                .push((ca.path.clone(), last_expiry(ca, &chain, now)?));
            let mut roots = RootCertStore::empty();
            let (added, _) = roots.add_parsable_certificates(chain);
            if added == 0 {
                return Err(Wrong::of(ca, "has no authority"));
            }
            loaded.roots = Some(Arc::new(roots));
        }
        Ok(loaded)
    }
}

/// Ring, everywhere.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| Arc::new(rustls::crypto::ring::default_provider()));
    PROVIDER.clone()
}

fn certificates(file: &PemFile, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, Wrong> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let all = all.map_err(|error| Wrong::of(file, format!("is no PEM: {error}")))?;
    if all.is_empty() {
        return Err(Wrong::of(file, "has no certificate in PEM"));
    }
    Ok(all)
}

fn identity(
    cert: &PemFile,
    chain: Vec<CertificateDer<'static>>,
    key: &PemFile,
    pem: &[u8],
) -> Result<CertifiedKey, Wrong> {
    let private = PrivateKeyDer::from_pem_slice(pem)
        .map_err(|error| Wrong::of(key, format!("has no private key in PEM: {error}")))?;
    CertifiedKey::from_der(chain, private, &provider()).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => Wrong::of(
            key,
            format!("does not fit {} {}", cert.setting, cert.path.display()),
        ),
        error => Wrong::of(key, format!("is no key for it: {error}")),
    })
}

/// When the first of a chain expires: each must be good.
fn expiry(file: &PemFile, chain: &[CertificateDer<'_>], now: i64) -> Result<i64, Wrong> {
    let mut first = i64::MAX;
    for certificate in chain {
        let (begins, ends) = validity(certificate)
            .ok_or_else(|| Wrong::of(file, "has a certificate that cannot be read"))?;
        in_time(file, begins, ends, now)?;
        first = first.min(ends);
    }
    Ok(first)
}

/// When the last of a bundle of authorities expires: one is enough, and an old one may stay beside its successor.
fn last_expiry(file: &PemFile, bundle: &[CertificateDer<'_>], now: i64) -> Result<i64, Wrong> {
    let readable = bundle.iter().filter_map(validity);
    let last = readable.max_by_key(|&(begins, ends)| (begins <= now, ends));
    let (begins, ends) = last.ok_or_else(|| Wrong::of(file, "has no authority"))?;
    in_time(file, begins, ends, now)?;
    Ok(ends)
}

fn in_time(file: &PemFile, begins: i64, ends: i64, now: i64) -> Result<(), Wrong> {
    if now > ends {
        return Err(Wrong::of(file, format!("has expired, at {}", shown(ends))));
    }
    if now < begins {
        return Err(Wrong::of(
            file,
            format!("is not valid before {}", shown(begins)),
        ));
    }
    Ok(())
}

fn validity(certificate: &CertificateDer<'_>) -> Option<(i64, i64)> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let validity = certificate.validity();
    Some((
        validity.not_before.timestamp(),
        validity.not_after.timestamp(),
    ))
}

fn shown(seconds: i64) -> String {
    let at = OffsetDateTime::from_unix_timestamp(seconds).ok();
    at.and_then(|at| at.format(&Rfc3339).ok())
        .unwrap_or_else(|| seconds.to_string())
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs().cast_signed())
}

/// What is made of a set of files, and made again when they change.
pub(crate) struct Watched<T> {
    files: Files,
    make: Box<dyn Fn(Loaded) -> Result<T, Wrong> + Send + Sync>,
    expiry: GaugeVec,
    current: ArcSwap<T>,
    seen: Mutex<Seen>,
}

/// What the files were when they were last looked at.
struct Seen {
    used: Contents,
    /// Something else, which is no good.
    refused: Option<Refused>,
}

struct Refused {
    found: Result<Contents, Wrong>,
    /// A pair of files is not written in one step: what is found once may be half of it.
    said: bool,
}

impl<T: Send + Sync + 'static> Watched<T> {
    /// Reads the files.
    ///
    /// # Errors
    /// What is wrong with them, by name.
    pub(crate) fn load(
        service: &'static str,
        files: Files,
        make: impl Fn(Loaded) -> Result<T, rustls::Error> + Send + Sync + 'static,
    ) -> Result<Arc<Watched<T>>, StartError> {
        let make = move |loaded| make(loaded).map_err(|error| Wrong(format!("TLS: {error}")));
        let read = files.read().and_then(|used| {
            let loaded = files.judge(&used, now())?;
            let expiries = loaded.expiries.clone();
            Ok((used, expiries, make(loaded)?))
        });
        let (used, expiries, made) = read.map_err(|wrong| {
            StartError::new(wrong.to_string(), "run make certs, or name other files")
        })?;
        let expiry = expiry_gauge(service);
        publish(&expiry, &expiries);
        Ok(Arc::new(Watched {
            files,
            make: Box::new(make),
            expiry,
            current: ArcSwap::from_pointee(made),
            seen: Mutex::new(Seen {
                used,
                refused: None,
            }),
        }))
    }

    pub(crate) fn current(&self) -> Arc<T> {
        self.current.load_full()
    }

    /// Starts the worker that looks at the files `every` so often.
    pub(crate) fn watch(self: &Arc<Self>, name: &'static str, every: Duration, tasks: &Tasks) {
        let (watched, stopping) = (self.clone(), tasks.stopping());
        tasks.worker(name, async move {
            loop {
                tokio::select! {
                    () = stopping.cancelled() => return Ok(()),
                    () = tokio::time::sleep(every) => {}
                }
                let watched = watched.clone();
                tokio::task::spawn_blocking(move || watched.look()).await?;
            }
        });
    }

    /// Reads the files again, and uses them if they have changed and are good.
    pub(crate) fn look(&self) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let found = self.files.read();
        if found.as_ref() == Ok(&seen.used) {
            if seen.refused.take().is_some_and(|refused| refused.said) {
                tracing::info!("certificate files are again what is in use");
            }
            return;
        }
        match found.clone().and_then(|contents| self.replace(contents)) {
            Ok(used) => {
                tracing::info!("certificate files changed and are in use");
                *seen = Seen {
                    used,
                    refused: None,
                };
            }
            Err(wrong) => match &mut seen.refused {
                Some(refused) if refused.found == found => refused.say(&wrong),
                _ => seen.refused = Some(Refused { found, said: false }),
            },
        }
    }

    fn replace(&self, contents: Contents) -> Result<Contents, Wrong> {
        let loaded = self.files.judge(&contents, now())?;
        let expiries = loaded.expiries.clone();
        self.current.store(Arc::new((self.make)(loaded)?));
        publish(&self.expiry, &expiries);
        Ok(contents)
    }
}

impl Refused {
    fn say(&mut self, wrong: &Wrong) {
        if !self.said {
            self.said = true;
            tracing::warn!(error = %wrong, "certificate files changed and are no good, the ones before stay in use");
        }
    }
}

fn publish(gauge: &GaugeVec, expiries: &[(PathBuf, i64)]) {
    for (file, at) in expiries {
        let file = file.display().to_string();
        gauge.with_label_values(&[&file]).set(*at as f64);
    }
}

fn expiry_gauge(service: &'static str) -> GaugeVec {
    static KNOWN: LazyLock<Mutex<HashMap<&'static str, GaugeVec>>> = LazyLock::new(Mutex::default);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let opts = || {
        Opts::new(
            format!("{service}_tls_certificate_expiry_timestamp_seconds"),
            "When what is in use of a file of certificates expires.",
        )
    };
    let new = || registered(GaugeVec::new(opts(), &["file"]));
    known.entry(service).or_insert_with(new).clone()
}

#[cfg(test)]
mod tests;
