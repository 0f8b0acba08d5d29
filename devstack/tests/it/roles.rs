//! Who may call what where roles are given: every method for every kind of caller, over gRPC and over HTTP.

use std::path::Path;

use devstack::{
    binaries::SERVICES,
    certs::{self, Authority},
    stack::{Options, Stack},
};
use pbjson_types::Empty;
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose};
use serde_json::{Value, json};
use time::{Duration, OffsetDateTime};
use tonic::{Code, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt as _;

use crate::{
    certified::{Web, call, grpc},
    deployments::read,
    test_stack::{binaries, eventually},
};

const HEART: u32 = 85_123_001;

/// Section 10 of the design, by role.
const MAY: [(&str, &[&str]); 4] = [
    ("operator", &["ReceiveStock"]),
    ("checkout", &["CreateOrder", "AbandonOrder", "CancelOrder"]),
    (
        "gateway",
        &[
            "OrderPayed",
            "CancelOrder",
            "AddToCart",
            "DeleteFromCart",
            "ListCart",
            "Purchase",
        ],
    ),
    ("reader", &[]),
];
const ANY_ROLE: [&str; 3] = ["ListOrder", "Stocks", "GetHistoryWithPeriod"];
const METHODS: [(&str, &[&str]); 3] = [
    (
        "/cart.Cart/",
        &["AddToCart", "DeleteFromCart", "ListCart", "Purchase"],
    ),
    (
        "/loms.Loms/",
        &[
            "CreateOrder",
            "ListOrder",
            "OrderPayed",
            "CancelOrder",
            "Stocks",
            "ReceiveStock",
            "AbandonOrder",
        ],
    ),
    ("/notifications.Notifications/", &["GetHistoryWithPeriod"]),
];

/// What somebody is who shows a certificate: a role, none, or not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Role(&'static str),
    NoRole,
    Nobody,
    Stranger,
}

/// Every caller by the certificate that it shows.
const CALLERS: [(Option<&str>, Kind); 12] = [
    (None, Kind::Nobody),
    (Some("operator"), Kind::Role("operator")),
    (Some("checkout"), Kind::Role("checkout")),
    (Some("gateway"), Kind::Role("gateway")),
    (Some("reader"), Kind::Role("reader")),
    // the outside party, of the same authority
    (Some("products"), Kind::NoRole),
    (Some("common"), Kind::Role("operator")),
    (Some("beside"), Kind::NoRole),
    (Some("wildcard"), Kind::NoRole),
    (Some("uri"), Kind::Role("gateway")),
    (Some("expired"), Kind::Stranger),
    (Some("foreign"), Kind::Stranger),
];

fn roles() -> Value {
    json!({
        "*": null,
        "operator": ["operator"],
        "checkout": ["checkout"],
        "gateway": ["gateway"],
        "reader": ["reader"],
        "desk.shop": ["operator", "gateway"],
        "spiffe://shop/gateway": ["gateway"],
    })
}

/// The usual certificates and those of odd callers.
fn write_certs(dir: &Path) {
    let authority = Authority::new().unwrap();
    authority.write(dir, certs::Layout::Together).unwrap();
    let sign = |owner: &str, common: &str, names: &[&str], until: Duration| {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, common);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = OffsetDateTime::now_utc() - Duration::days(9);
        params.not_after = OffsetDateTime::now_utc() + until;
        authority.sign(dir, owner, &params).unwrap();
    };
    let day = Duration::days(1);
    sign("common", "operator", &[], day);
    sign("beside", "operator", &["stranger"], day);
    sign("wildcard", "operator", &["*.shop"], day);
    sign("expired", "operator", &["operator"], -day);
    let foreign = certs::params("operator").unwrap();
    let other = Authority::new().unwrap();
    other.sign(dir, "foreign", &foreign).unwrap();
    let mut uri = CertificateParams::default();
    uri.subject_alt_names = vec![rcgen::SanType::URI(
        "spiffe://shop/gateway".try_into().unwrap(),
    )];
    authority.sign(dir, "uri", &uri).unwrap();
}

async fn guarded_stack(certs: &Path) -> Stack {
    let guarded = json!({
        "tls": {"client_auth": "optional"},
        "admin": {"listen": "127.0.0.1:0"},
        "roles": roles(),
    });
    let options = Options {
        quiet: true,
        certs: Some(certs.to_owned()),
        settings: SERVICES
            .iter()
            .map(|name| (*name, guarded.clone()))
            .collect(),
        ..Options::new(binaries().await)
    };
    Stack::start(&options).await.unwrap()
}

fn may(kind: Kind, method: &str) -> bool {
    let Kind::Role(role) = kind else { return false };
    let own = MAY.iter().find(|(name, _)| *name == role).unwrap().1;
    own.contains(&method) || ANY_ROLE.contains(&method)
}

#[track_caller]
fn is_as_expected(kind: Kind, is_allowed: bool, answer: &Result<Empty, Status>, cell: &str) {
    let code = answer.as_ref().err().map_or(Code::Ok, Status::code);
    let is_refused = matches!(code, Code::Unauthenticated | Code::PermissionDenied);
    match kind {
        Kind::Stranger => {
            let status = answer.as_ref().expect_err(cell);
            assert!(status.metadata().get("x-trace-id").is_none(), "{cell}");
        }
        Kind::Nobody => assert_eq!(code, Code::Unauthenticated, "{cell}"),
        _ if is_allowed => assert!(!is_refused, "{cell}: {answer:?}"),
        _ => {
            let status = answer.as_ref().expect_err(cell);
            assert_eq!(code, Code::PermissionDenied, "{cell}: {status:?}");
            let info = status.get_details_error_info().expect(cell);
            assert_eq!(info.reason, "ROLE_REQUIRED", "{cell}");
        }
    }
}

#[tokio::test]
async fn every_cell_of_the_table_over_both_doors() {
    let dir = tempfile::tempdir().unwrap();
    write_certs(dir.path());
    let stack = guarded_stack(dir.path()).await;
    for (shown, kind) in CALLERS {
        for (name, (prefix, methods)) in SERVICES.into_iter().zip(METHODS) {
            let channel = grpc(dir.path(), shown, stack.service(name).unwrap().grpc());
            for method in methods {
                let answer = call(&channel, &format!("{prefix}{method}")).await;
                let cell = format!("{shown:?} {method}");
                is_as_expected(kind, may(kind, method), &answer, &cell);
            }
            for trick in ["Nothing", &format!("{}/", methods[0]), "%4fther"] {
                let path = format!("{prefix}{trick}");
                let answer = call(&channel, &path).await;
                is_as_expected(kind, false, &answer, &format!("{shown:?} {path}"));
            }
            let mut health = HealthClient::new(channel);
            let health = health.check(HealthCheckRequest::default()).await;
            let code = health.err().map_or(Code::Ok, |status| status.code());
            match kind {
                Kind::Nobody => assert_eq!(code, Code::Unauthenticated),
                Kind::Stranger => assert_ne!(code, Code::Ok),
                _ => assert_eq!(code, Code::Ok, "{shown:?}"),
            }
        }
        over_http(&stack, dir.path(), shown, kind).await;
    }
    stack.stop().await.unwrap();
}

async fn over_http(stack: &Stack, certs: &Path, shown: Option<&str>, kind: Kind) {
    let web = Web::showing(certs, shown);
    for route in read("proto/routes.txt").lines() {
        let words: Vec<_> = route.split_whitespace().collect();
        let [service, path, method] = words[..] else {
            continue;
        };
        if !SERVICES.contains(&service) {
            continue;
        }
        let door = stack.service(service).unwrap().http();
        let cell = format!("{shown:?} {path}");
        let method = method.rsplit('/').next().unwrap();
        let answer = web.answer(door, path, &json!({})).await;
        match kind {
            Kind::Stranger => assert_eq!(answer, None, "{cell}"),
            Kind::Nobody => {
                let (status, body) = answer.expect(&cell);
                assert_eq!((status, &body["code"]), (401, &json!(16)), "{cell}");
            }
            _ if may(kind, method) => {
                let (status, _) = answer.expect(&cell);
                assert!(![401, 403].contains(&status), "{cell}: {status}");
            }
            _ => {
                let (status, body) = answer.expect(&cell);
                assert_eq!((status, &body["code"]), (403, &json!(7)), "{cell}");
                assert_eq!(body["details"][0]["reason"], "ROLE_REQUIRED", "{cell}");
            }
        }
        // a path that is no route is no way around
        let encoded = format!("/%{:02x}{}", path.as_bytes()[1], &path[2..]);
        for trick in [
            format!("/{path}"),
            format!("{path}/"),
            path.to_uppercase(),
            encoded,
        ] {
            let status = web.post(door, &trick, &json!({})).await;
            let expected = (kind != Kind::Stranger).then_some(404);
            assert_eq!(status, expected, "{cell} {trick}");
        }
    }
}

/// The roles of `loms/config.example.yaml`, which compose and devstack run with.
#[tokio::test]
async fn as_shipped_a_delivery_is_the_operators_and_the_rest_is_everybodys() {
    let example = read("loms/config.example.yaml");
    let example: Value = serde_yaml::from_str(&example).unwrap();
    let dir = tempfile::tempdir().unwrap();
    write_certs(dir.path());
    let options = Options {
        quiet: true,
        certs: Some(dir.path().to_owned()),
        services: &["loms"],
        settings: json!({"loms": {"roles": example["roles"]}}),
        ..Options::new(binaries().await)
    };
    let stack = Stack::start(&options).await.unwrap();
    let loms = stack.service("loms").unwrap();
    for (shown, expected) in [
        (Some("operator"), Code::InvalidArgument),
        (Some("products"), Code::PermissionDenied),
        (Some("checkout"), Code::PermissionDenied),
        (None, Code::Unauthenticated),
    ] {
        let channel = grpc(dir.path(), shown, loms.grpc());
        let booked = call(&channel, "/loms.Loms/ReceiveStock").await;
        assert_eq!(booked.unwrap_err().code(), expected, "{shown:?}");
        for (method, expected) in [
            ("CreateOrder", Code::InvalidArgument),
            ("OrderPayed", Code::NotFound),
            ("CancelOrder", Code::NotFound),
            ("ListOrder", Code::NotFound),
        ] {
            let answer = call(&channel, &format!("/loms.Loms/{method}")).await;
            let code = answer.unwrap_err().code();
            assert_eq!(code, expected, "{shown:?} {method}");
        }
    }
    let plain = devstack::clients::http_client().unwrap();
    let paid = plain.post(format!("http://{}/orderPayed", loms.http()));
    let paid = paid.body("{}").send().await.unwrap();
    assert_eq!(paid.status(), 404, "as old callers over HTTP know it");
    stack.stop().await.unwrap();
}

#[tokio::test]
async fn probes_and_metrics_need_no_certificate_and_have_no_calls_beside_them() {
    let dir = tempfile::tempdir().unwrap();
    write_certs(dir.path());
    let stack = guarded_stack(dir.path()).await;
    let plain = devstack::clients::http_client().unwrap();
    let operator = Web::showing(dir.path(), Some("operator"));
    for name in SERVICES {
        let service = stack.service(name).unwrap();
        let (admin, http) = (service.admin(), service.http());
        assert_ne!(admin, http);
        for path in ["/metrics", "/healthz", "/readyz", "/docs/", "/openapi.json"] {
            let url = format!("http://{admin}{path}");
            let answer = plain.get(&url).send().await.unwrap();
            assert_eq!(answer.status(), 200, "{url}");
            let moved = operator.0.get(format!("https://{http}{path}"));
            assert_eq!(moved.send().await.unwrap().status(), 404, "{name} {path}");
        }
        for route in ["/orderPayed", "/stocks", "/purchase", "/history"] {
            let answer = plain.post(format!("http://{admin}{route}")).body("{}");
            assert_eq!(answer.send().await.unwrap().status(), 404, "{name} {route}");
        }
        // what comes in the clear does not get past the handshake
        let clear = plain.post(format!("http://{http}/stocks")).body("{}");
        assert!(clear.send().await.is_err(), "{name}");
        let metrics = plain.get(format!("http://{admin}/metrics")).send().await;
        let metrics = metrics.unwrap().text().await.unwrap();
        let cert = certs::cert(dir.path(), name).display().to_string();
        let expiry = format!("{name}_tls_certificate_expiry_timestamp_seconds{{file=\"{cert}\"}} ");
        let expiry = metrics.lines().find_map(|line| line.strip_prefix(&expiry));
        let expiry: f64 = expiry.expect("an expiry").parse().unwrap();
        let left = expiry - OffsetDateTime::now_utc().unix_timestamp() as f64;
        assert!((left / 86_400.0 - 800.0).abs() < 1.0, "{name}: {left}");
    }
    stack.stop().await.unwrap();
}

#[tokio::test]
async fn a_delivery_says_who_booked_it_and_its_units_are_bought() {
    use proto::loms::{ReceiveStockRequest, StockLine, loms_client::LomsClient};
    let dir = tempfile::tempdir().unwrap();
    write_certs(dir.path());
    let stack = guarded_stack(dir.path()).await;
    let book = async |shown: &str, id: &str| {
        let address = stack.service("loms").unwrap().grpc();
        let line = StockLine {
            warehouse_id: 1,
            sku: HEART,
            count: 2,
        };
        let request = ReceiveStockRequest {
            delivery_id: id.to_owned(),
            lines: vec![line],
        };
        let mut loms = LomsClient::new(grpc(dir.path(), Some(shown), address));
        loms.receive_stock(request).await.map(drop)
    };
    book("operator", "by-operator").await.unwrap();
    let refused = book("products", "by-products").await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    let log = stack.service("loms").unwrap().log().to_owned();
    eventually("the line of the delivery", async || {
        let log = std::fs::read_to_string(&log).unwrap();
        log.lines().any(|line| {
            let line: Value = serde_json::from_str(line).unwrap_or_default();
            line["delivery.id"] == "by-operator" && line["delivery.booked_by"] == "operator"
        })
    })
    .await;
    let log = std::fs::read_to_string(&log).unwrap();
    assert!(!log.contains("by-products"), "{log}");

    // a user's purchase goes through: the gateway asks checkout, checkout asks LOMS
    let gateway = Web::showing(dir.path(), Some("gateway"));
    let door = |name| stack.service(name).unwrap().http();
    let line = json!({"user": 1, "sku": HEART, "count": 1});
    for (service, path, body) in [
        ("checkout", "/addToCart", line),
        ("checkout", "/purchase", json!({"user": 1})),
        ("loms", "/orderPayed", json!({"orderID": 1})),
    ] {
        assert_eq!(
            gateway.post(door(service), path, &body).await,
            Some(200),
            "{path}"
        );
    }
    stack.stop().await.unwrap();
}
