//! Certificate files that change under a service that runs, and files with which none starts.

use std::path::Path;

use devstack::{
    certs::{self, Authority},
    clients::channel,
    stack::{Options, Stack},
};
use proto::loms::{StocksRequest, loms_client::LomsClient};
use serde_json::{Value, json};
use time::{Duration, OffsetDateTime};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, ClientTlsConfig};

use crate::{
    replica::Replica,
    test_stack::{binaries, eventually},
};

async fn loms(certs: &Path) -> Stack {
    let options = Options {
        quiet: true,
        services: &["loms"],
        certs: Some(certs.to_owned()),
        settings: json!({"loms": {"tls": {"reload_every": "100ms"}}}),
        ..Options::new(binaries().await)
    };
    Stack::start(&options).await.unwrap()
}

/// Who trusts the authorities of these sets.
fn trusting(stack: &Stack, sets: &[&Path]) -> LomsClient<tonic::transport::Channel> {
    let read = |set: &&Path| Certificate::from_pem(std::fs::read(certs::ca(set)).unwrap());
    let tls = ClientTlsConfig::new().ca_certificates(sets.iter().map(read));
    LomsClient::new(channel(stack.service("loms").unwrap().grpc(), tls).unwrap())
}

async fn answers(loms: &LomsClient<tonic::transport::Channel>) -> bool {
    let asked = loms.clone().stocks(StocksRequest { sku: 1 }).await;
    asked.is_ok()
}

fn said(stack: &Stack, message: &str) -> usize {
    let log = std::fs::read_to_string(stack.service("loms").unwrap().log()).unwrap();
    let lines = log.lines().map(serde_json::from_str::<Value>);
    lines
        .filter(|line| line.as_ref().is_ok_and(|line| line["message"] == message))
        .count()
}

const REFUSED: &str = "certificate files changed and are no good, the ones before stay in use";
const AGAIN: &str = "certificate files are again what is in use";

#[tokio::test]
async fn new_files_are_served_bad_ones_are_said_once_and_no_call_fails() {
    let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (old, new) = (old.path(), new.path());
    certs::write(old, certs::Layout::Together).unwrap();
    let authority = Authority::new().unwrap();
    authority.write(new, certs::Layout::Together).unwrap();
    let stack = std::sync::Arc::new(loms(old).await);

    let done = CancellationToken::new();
    let mut callers = JoinSet::new();
    let kept = trusting(&stack, &[old]);
    assert!(answers(&kept).await);
    for _ in 0..2 {
        let (stack, kept, done) = (stack.clone(), kept.clone(), done.clone());
        let sets = [old.to_owned(), new.to_owned()];
        callers.spawn(async move {
            while !done.is_cancelled() {
                assert!(answers(&kept).await, "the connection that was there");
                let fresh = trusting(&stack, &[&sets[0], &sets[1]]);
                assert!(answers(&fresh).await, "a new connection");
            }
        });
    }
    let good = std::fs::read(certs::key(old, "loms")).unwrap();
    std::fs::write(certs::key(old, "loms"), "no key").unwrap();
    eventually("a line", async || said(&stack, REFUSED) == 1).await;
    std::fs::write(certs::key(old, "loms"), good).unwrap();
    eventually("another", async || said(&stack, AGAIN) == 1).await;

    assert!(!answers(&trusting(&stack, &[new])).await);
    let params = certs::params("loms").unwrap();
    authority.sign(old, "loms", &params).unwrap();
    eventually("the new certificate", async || {
        answers(&trusting(&stack, &[new])).await
    })
    .await;
    assert!(!answers(&trusting(&stack, &[old])).await);
    assert_eq!((said(&stack, REFUSED), said(&stack, AGAIN)), (1, 1));
    done.cancel();
    callers.join_all().await;
    drop(kept);
    let stack = std::sync::Arc::into_inner(stack).unwrap();
    stack.stop().await.unwrap();
}

#[tokio::test]
async fn what_cannot_be_shown_or_would_let_nobody_in_is_said_at_start() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new().unwrap();
    authority
        .write(dir.path(), certs::Layout::Together)
        .unwrap();
    let mut expired = certs::params("loms").unwrap();
    expired.not_after = OffsetDateTime::now_utc() - Duration::hours(1);
    authority.sign(dir.path(), "expired", &expired).unwrap();
    let stack = loms(dir.path()).await;
    let file = |owner| certs::cert(dir.path(), owner).display().to_string();
    let key = |owner| certs::key(dir.path(), owner).display().to_string();
    let roles = json!({"*": null});
    let admin = json!({"listen": "127.0.0.1:0"});
    let wrong = [
        (
            json!({"tls": {"cert": file("expired"), "key": key("expired")}}),
            format!("tls.cert {} has expired, at ", file("expired")),
        ),
        (
            json!({"tls": {"key": key("operator")}}),
            format!("tls.key {} does not fit", key("operator")),
        ),
        (
            json!({"tls": {"client_auth": "required"}}),
            "admin.listen is missing".into(),
        ),
        (
            json!({"roles": roles, "tls": {"client_auth": "optional"}}),
            "admin.listen is missing".into(),
        ),
        (
            json!({"roles": roles, "admin": admin, "tls": {"client_auth": "none"}}),
            "roles without tls.client_auth".into(),
        ),
        (
            json!({"roles": {"operator": null, "*": null}, "admin": admin}),
            "roles is empty".into(),
        ),
        (
            json!({"roles": {"operator": ["operater"]}, "admin": admin}),
            "operater".into(),
        ),
        (
            json!({"tls": {"reload_every": "0s"}}),
            "tls.reload_every".into(),
        ),
    ];
    for (setting, named) in wrong {
        let output = Replica::refused(&stack, &setting).await;
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{setting}: {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{setting}: {said}");
        assert!(said.contains(&named), "{setting}: {said}");
    }
    stack.stop().await.unwrap();
}
