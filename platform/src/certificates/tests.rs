//! Good and bad files, at start and later.

use std::sync::atomic::{AtomicUsize, Ordering};

use tracing::{
    Event, Level, Subscriber,
    subscriber::{set_global_default, with_default},
};
use tracing_subscriber::{Layer, layer::Context, layer::SubscriberExt as _};

use super::*;
use crate::test_authority::{Authority, EXPIRED, Folder, GOOD};

fn files(folder: &Folder) -> Files {
    let file = |setting, name| PemFile {
        setting,
        path: folder.path(name),
    };
    Files {
        identity: Some((file("tls.cert", "cert.pem"), file("tls.key", "key.pem"))),
        ca: Some(file("tls.client_ca", "ca.pem")),
    }
}

/// Watched for the certificate alone.
fn load(
    service: &'static str,
    folder: &Folder,
) -> Result<Arc<Watched<Arc<CertifiedKey>>>, StartError> {
    Watched::load(service, files(folder), |loaded| {
        loaded
            .identity
            .ok_or(rustls::Error::NoCertificatesPresented)
    })
}

#[track_caller]
fn is_refused(folder: &Folder, named: &[&str]) {
    let Err(error) = load("refused", folder) else {
        panic!("loaded")
    };
    let said = error.to_string();
    assert!(named.iter().all(|name| said.contains(name)), "{said}");
    assert_eq!(said.lines().count(), 1);
}

#[test]
fn what_is_no_good_is_said_by_the_name_of_its_file() {
    let authority = Authority::new(GOOD);
    let good = authority.sign("loms", GOOD);
    let folder = Folder::of(&authority, &good);
    assert!(load("refused", &folder).is_ok());
    let cert = folder.path("cert.pem").display().to_string();

    folder.show(&authority.sign("loms", EXPIRED));
    is_refused(&folder, &["tls.cert", &cert, "has expired, at 20"]);
    folder.show(&authority.sign("loms", (1, 2)));
    is_refused(&folder, &["tls.cert", &cert, "is not valid before 20"]);
    // a chain is as good as the worst of it
    let expired = authority.sign("between", EXPIRED).cert;
    folder.write("cert.pem", &format!("{}{expired}", good.cert));
    folder.write("key.pem", &good.key);
    is_refused(&folder, &[&cert, "has expired"]);

    folder.show(&good);
    folder.write("key.pem", &authority.sign("other", GOOD).key);
    is_refused(
        &folder,
        &["tls.key", "key.pem does not fit tls.cert", &cert],
    );
    folder.write("key.pem", "no key");
    is_refused(&folder, &["tls.key", "key.pem"]);
    folder.show(&good);
    for garbage in ["", "no certificate", "-----BEGIN CERTIFICATE-----\nAAAA"] {
        folder.write("cert.pem", garbage);
        is_refused(&folder, &["tls.cert", &cert]);
    }
    std::fs::remove_file(folder.path("cert.pem")).unwrap();
    is_refused(&folder, &["reading tls.cert", &cert]);

    folder.show(&good);
    folder.write("ca.pem", &Authority::new(EXPIRED).pem());
    is_refused(&folder, &["tls.client_ca", "ca.pem has expired"]);
}

#[test]
fn an_old_authority_may_stay_beside_its_successor() {
    let (old, new) = (Authority::new(EXPIRED), Authority::new(GOOD));
    let folder = Folder::of(&new, &new.sign("loms", GOOD));
    folder.write("ca.pem", &format!("{}{}", old.pem(), new.pem()));
    assert!(load("successor", &folder).is_ok());
}

/// Counts warnings and what was said of files that are good.
#[derive(Clone, Default)]
struct Said {
    warnings: Arc<AtomicUsize>,
    notes: Arc<AtomicUsize>,
}

impl<S: Subscriber> Layer<S> for Said {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let counter = match *event.metadata().level() {
            Level::WARN => &self.warnings,
            _ => &self.notes,
        };
        counter.fetch_add(1, Ordering::SeqCst);
    }
}

impl Said {
    /// Looks at the files so often; how many warnings and notes there were until now.
    fn looking<T: Send + Sync + 'static>(
        &self,
        watched: &Watched<T>,
        times: usize,
    ) -> (usize, usize) {
        // While a single subscriber exists, tracing asks the thread that reaches an event first
        // whether anybody wants it, and remembers the answer: the thread of another test would
        // say no. A default for every thread says yes.
        let _ = set_global_default(tracing_subscriber::registry());
        let subscriber = tracing_subscriber::registry().with(self.clone());
        with_default(subscriber, || (0..times).for_each(|_| watched.look()));
        let count = |counter: &AtomicUsize| counter.load(Ordering::SeqCst);
        (count(&self.warnings), count(&self.notes))
    }
}

fn expiry_of(service: &'static str, folder: &Folder, file: &str) -> i64 {
    let file = folder.path(file).display().to_string();
    expiry_gauge(service).with_label_values(&[&file]).get() as i64
}

#[test]
fn a_bad_file_keeps_the_old_one_and_is_said_once() {
    let authority = Authority::new(GOOD);
    let first = authority.sign("loms", GOOD);
    let folder = Folder::of(&authority, &first);
    let watched = load("reloading", &folder).unwrap();
    let (used, said) = (watched.current(), Said::default());
    let is_used = || Arc::ptr_eq(&watched.current(), &used);
    assert_eq!(said.looking(&watched, 3), (0, 0));

    // a certificate without its key yet is half of a change
    let next = authority.sign("loms", (-1, 20));
    folder.write("cert.pem", &next.cert);
    assert_eq!(said.looking(&watched, 1), (0, 0));
    assert_eq!(said.looking(&watched, 4), (1, 0));
    assert!(is_used());
    // another state is another line, and so is a file that is gone
    folder.show(&authority.sign("loms", EXPIRED));
    assert_eq!(said.looking(&watched, 4), (2, 0));
    std::fs::remove_file(folder.path("key.pem")).unwrap();
    assert_eq!(said.looking(&watched, 4), (3, 0));
    folder.show(&first);
    assert_eq!(said.looking(&watched, 4), (3, 1));
    assert!(is_used());

    folder.show(&next);
    assert_eq!(said.looking(&watched, 4), (3, 2));
    assert!(!is_used());
}

#[test]
fn the_metric_is_when_what_is_in_use_expires() {
    let authority = Authority::new((-1, 100));
    let folder = Folder::of(&authority, &authority.sign("loms", (-1, 10)));
    let watched = load("expiring", &folder).unwrap();
    let day = 24 * 60 * 60;
    let is_in = |file, days: i64| {
        let left = expiry_of("expiring", &folder, file) - now();
        assert!((left - days * day).abs() < 60, "{file}: {left}");
    };
    is_in("cert.pem", 10);
    is_in("ca.pem", 100);

    folder.show(&authority.sign("loms", EXPIRED));
    watched.look();
    is_in("cert.pem", 10);
    // of a chain the first that expires
    let renewed = authority.sign("loms", (-1, 30));
    let between = authority.sign("between", (-1, 20));
    folder.write("cert.pem", &format!("{}{}", renewed.cert, between.cert));
    folder.write("key.pem", &renewed.key);
    watched.look();
    is_in("cert.pem", 20);
}
