//! Neighbours over TLS: by config, verified, and said clearly when it cannot be.

use std::path::Path;

use checkout::{app::App, config::Config};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::task::JoinSet;
use tonic::{Code, transport::Identity};

use crate::{
    products_stub::ProductsStub,
    test_app::{Neighbours, TestApp, config, fill},
};

/// A certificate for this machine, signed by itself, written to `file`.
fn certificate(file: &Path) -> Identity {
    certificate_for("127.0.0.1", file)
}

fn certificate_for(name: &str, file: &Path) -> Identity {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    std::fs::write(file, made.cert.pem()).unwrap();
    Identity::from_pem(made.cert.pem(), made.signing_key.serialize_pem())
}

async fn beside(identity: Option<Identity>, pool: &PgPool, changes: Value) -> TestApp {
    let mut serving = JoinSet::new();
    let products = ProductsStub::start_with(&mut serving, identity).await;
    let neighbours = Neighbours::beside(products, serving).await;
    TestApp::beside(neighbours, pool.clone(), changes).await
}

#[tokio::test]
async fn products_come_over_tls_from_whom_the_authority_vouches_for() {
    let pool = crate::database().await;
    let _ = rustls::crypto::ring::default_provider().install_default();
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours.pem"), dir.path().join("theirs.pem"));
    let (identity, other) = (certificate(&ours), certificate(&theirs));
    fill(&pool, 1, &(5..7)).await;
    let over_tls = |ca: &Path| json!({"products": {"tls": true, "ca": ca}});

    let app = beside(Some(identity.clone()), &pool, over_tls(&ours)).await;
    assert_eq!(app.cart(1).await, [(5, 1), (6, 1)]);
    app.finish().await;

    // somebody else's certificate; no TLS there; no TLS here
    for (identity, changes) in [
        (Some(other), over_tls(&ours)),
        (None, over_tls(&ours)),
        (Some(identity), json!({"products": {"tls": false}})),
    ] {
        let app = beside(identity, &pool, changes.clone()).await;
        let status = app.list(1).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable, "{changes}: {status:?}");
        assert_eq!(app.products.requests(), 0, "{changes}");
        app.finish().await;
    }
}

#[tokio::test]
async fn an_authority_that_is_not_there_is_said_before_anything_is_served() {
    let pool = crate::database().await;
    let neighbours = Neighbours::start().await;
    let changes = json!({"products": {"tls": true, "ca": "nowhere/ca.pem"}});
    let config: Config =
        serde_json::from_value(config(&pool, neighbours.addresses, &changes)).unwrap();
    let Err(error) = App::bind(config).await else {
        panic!("it started");
    };
    assert!(error.to_string().contains("nowhere/ca.pem"), "{error}");
}

/// The gRPC port of checkout is plaintext here: LOMS may be moved to TLS before it, or after.
#[tokio::test]
async fn loms_has_a_tls_of_its_own_and_a_name_of_its_own() {
    let pool = crate::database().await;
    let _ = rustls::crypto::ring::default_provider().install_default();
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("loms.pem");
    let identity = certificate_for("loms.shop.test", &ca);
    let named = json!({"loms": {"tls": {"ca": ca, "server_name": "loms.shop.test"}}});
    let (by_address, plain) = (
        json!({"loms": {"tls": {"ca": ca}}}),
        json!({"loms": {"tls": {"enabled": false}}}),
    );
    for (user, changes, is_reached) in [(1, named, true), (2, by_address, false), (3, plain, false)]
    {
        let neighbours = Neighbours::with_tls(identity.clone()).await;
        neighbours.loms.stock(5, 10);
        let app = TestApp::beside(neighbours, pool.clone(), changes.clone()).await;
        match app.add(user, 5, 1).await {
            Ok(()) => assert!(is_reached, "{changes}"),
            Err(status) => {
                assert_eq!(status.code(), Code::Unavailable, "{changes}: {status:?}");
                assert!(!is_reached, "{changes}");
            }
        }
        app.finish().await;
    }
}

#[tokio::test]
async fn half_an_identity_is_none() {
    let pool = crate::database().await;
    let neighbours = Neighbours::start().await;
    let changes = json!({"loms": {"tls": {"cert": "certs/checkout.pem"}}});
    let config: Config =
        serde_json::from_value(config(&pool, neighbours.addresses, &changes)).unwrap();
    let Err(error) = App::bind(config).await else {
        panic!("it started");
    };
    assert!(error.to_string().contains("loms.tls"), "{error}");
}
