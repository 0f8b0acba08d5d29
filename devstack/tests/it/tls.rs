//! Who is let in: certificates of callers, asked for, required, of the wrong authority; and plaintext.

use devstack::{
    certs::{self, Layout},
    stack::{Options, Stack},
};
use futures::future::join_all;
use proto::loms::{
    ReceiveStockRequest, ReceiveStockResponse, StockLine, StocksRequest, loms_client::LomsClient,
};
use rcgen::KeyPair;
use serde_json::{Value, json};
use time::OffsetDateTime;
use tonic::{Code, Response, Status, transport::Channel};

use crate::{
    caller::Caller,
    certified::Web,
    replica::Replica,
    test_stack::{TestStack, binaries},
};

const HEART: u32 = 85_123_001;

async fn receive(
    mut loms: LomsClient<Channel>,
    id: &str,
) -> Result<Response<ReceiveStockResponse>, Status> {
    let line = StockLine {
        warehouse_id: 1,
        sku: HEART,
        count: 1,
    };
    loms.receive_stock(ReceiveStockRequest {
        delivery_id: id.to_owned(),
        lines: vec![line],
    })
    .await
}

async fn on_sale(mut loms: LomsClient<Channel>) -> Result<u64, Status> {
    let stocks = loms
        .stocks(StocksRequest { sku: HEART })
        .await?
        .into_inner();
    Ok(stocks.stocks.iter().map(|stock| stock.count).sum())
}

async fn loms() -> Stack {
    let options = Options {
        quiet: true,
        services: &["loms"],
        ..Options::new(binaries().await)
    };
    Stack::start(&options).await.unwrap()
}

/// A handshake that fails is no answer of a service; what the client makes of it depends on the moment.
fn not_let_in<T: std::fmt::Debug>(answer: Result<T, Status>) {
    let status = answer.expect_err("not let in");
    let broken = [Code::Unavailable, Code::Unknown, Code::Cancelled];
    assert!(broken.contains(&status.code()), "{status:?}");
    assert!(status.metadata().get("x-trace-id").is_none(), "{status:?}");
}

#[tokio::test]
async fn deliveries_are_booked_by_callers_who_show_who_they_are() {
    let stack = loms().await;
    let other = tempfile::tempdir().unwrap();
    certs::write(other.path(), Layout::Together).unwrap();

    let optional = Replica::start(&stack, &json!({"tls": {"client_auth": "optional"}})).await;
    let refused = receive(optional.stranger(), "d1").await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
    assert!(refused.message().contains("certificate"), "{refused:?}");
    assert_eq!(on_sale(optional.stranger()).await.unwrap(), 0);
    receive(optional.operator(stack.certs()), "d1")
        .await
        .unwrap();
    assert_eq!(on_sale(optional.stranger()).await.unwrap(), 1);
    not_let_in(receive(optional.operator(other.path()), "d2").await);
    for path in ["/receiveStock", "/loms.Loms/ReceiveStock"] {
        let url = format!("http://{}{path}", optional.http);
        let http = devstack::clients::http_client().unwrap();
        let answer = http.post(url).body("{}").send().await.unwrap();
        assert_eq!(answer.status().as_u16(), 404, "{path}");
    }
    optional.stop().await;

    // without being asked nobody shows one
    let none = Replica::start(&stack, &json!({"tls": {"client_auth": "none"}})).await;
    let refused = receive(none.operator(stack.certs()), "d3")
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    none.stop().await;

    let open = json!({"tls": {"client_auth": "none"}, "admin": {"allow_unauthenticated": true}});
    let open = Replica::start(&stack, &open).await;
    receive(open.stranger(), "d4").await.unwrap();
    open.stop().await;

    // callers may have another authority than servers
    let foreign = json!({"tls": {"client_auth": "optional", "client_ca": certs::ca(other.path())}});
    let foreign = Replica::start(&stack, &foreign).await;
    receive(foreign.operator(other.path()), "d5").await.unwrap();
    not_let_in(receive(foreign.operator(stack.certs()), "d6").await);
    foreign.stop().await;
    stack.stop().await.unwrap();
}

/// Many who show what is no good, at once, on a service that runs.
#[tokio::test]
async fn certificates_that_are_no_good_are_refused_and_hold_no_other_up() {
    let stack = loms().await;
    let authority = certs::Authority::new().unwrap();
    let good = tempfile::tempdir().unwrap();
    authority.write(good.path(), Layout::Together).unwrap();
    let settings = json!({
        "tls": {"client_auth": "required", "client_ca": certs::ca(good.path())},
        "admin": {"listen": "127.0.0.1:0"},
        "limits": {"connections": 20},
    });
    let required = Replica::start(&stack, &settings).await;
    let mut params = certs::params(certs::OPERATOR).unwrap();
    params.not_after = OffsetDateTime::now_utc() - time::Duration::hours(1);
    let expired = tempfile::tempdir().unwrap();
    authority
        .sign(expired.path(), certs::OPERATOR, &params)
        .unwrap();
    let foreign = tempfile::tempdir().unwrap();
    certs::write(foreign.path(), Layout::Together).unwrap();
    let alone = tempfile::tempdir().unwrap();
    let key = KeyPair::generate().unwrap();
    let signed = certs::params(certs::OPERATOR).unwrap().self_signed(&key);
    let written = [
        (
            certs::cert(alone.path(), certs::OPERATOR),
            signed.unwrap().pem(),
        ),
        (
            certs::key(alone.path(), certs::OPERATOR),
            key.serialize_pem(),
        ),
    ];
    for (file, text) in written {
        std::fs::write(file, text).unwrap();
    }
    for bad in [&expired, &foreign, &alone] {
        // more than there may be connections
        let calls = (0..50).map(|_| on_sale(required.operator(bad.path())));
        for refused in join_all(calls).await {
            not_let_in(refused);
        }
        let answered = on_sale(required.operator(good.path())).await;
        assert_eq!(answered.unwrap(), 0);
    }
    required.stop().await;
    stack.stop().await.unwrap();
}

#[tokio::test]
async fn where_certificates_are_required_checkout_shows_its_own() {
    let required = json!({
        "tls": {"client_auth": "required"},
        "admin": {"listen": "127.0.0.1:0"},
    });
    let settings = json!({"loms": required, "checkout": required});
    let mut stack = TestStack::start_with(settings, &[(1, HEART, 3)]).await;
    // the stack's own caller of LOMS is the operator; the one of checkout shows nothing
    let caller = Caller(stack.clients.clone());
    not_let_in(caller.add(5, HEART, 1).await);
    let stack_of = stack.stack();
    let gateway = Web::showing(stack_of.certs(), Some(certs::GATEWAY));
    let checkout = stack_of.service("checkout").unwrap().http();
    let body = json!({"user": 5, "sku": HEART, "count": 2});
    assert_eq!(gateway.post(checkout, "/addToCart", &body).await, Some(200));
    let buyer = json!({"user": 5});
    assert_eq!(gateway.post(checkout, "/purchase", &buyer).await, Some(200));

    // nobody pays, over TLS or without, who shows nothing
    let loms = stack_of.service("loms").unwrap().http();
    let nobody = Web::showing(stack_of.certs(), None);
    let order = json!({"orderID": 1});
    assert_eq!(nobody.post(loms, "/orderPayed", &order).await, None);
    let plain = devstack::clients::http_client().unwrap();
    let plain = plain.post(format!("http://{loms}/orderPayed"));
    assert!(plain.body(order.to_string()).send().await.is_err());
    assert_eq!(gateway.post(loms, "/orderPayed", &order).await, Some(200));

    let again = Replica::start(stack_of, &json!({})).await;
    not_let_in(on_sale(again.stranger()).await);
    assert_eq!(on_sale(again.operator(stack_of.certs())).await.unwrap(), 1);
    again.stop().await;
    stack.finish().await;
}

#[tokio::test]
async fn without_tls_it_is_plaintext_and_says_no_to_tls() {
    let stack = loms().await;
    let plain = json!({"tls": {"enabled": false, "client_auth": "none"}});
    let plain = Replica::start(&stack, &plain).await;
    let channel = Channel::from_shared(format!("http://{}", plain.grpc)).unwrap();
    let channel = channel.connect().await.unwrap();
    assert_eq!(on_sale(LomsClient::new(channel)).await.unwrap(), 0);
    not_let_in(on_sale(plain.stranger()).await);
    plain.stop().await;
    stack.stop().await.unwrap();
}

/// Callers are moved to TLS one by one: LOMS serves both meanwhile.
#[tokio::test]
async fn a_plaintext_port_is_beside_for_a_while_and_has_no_role() {
    let stack = loms().await;
    let both = json!({"grpc": {"listen": "127.0.0.1:0", "plaintext_listen": "127.0.0.1:0"}});
    let plain = |replica: &Replica| {
        let address = format!("http://{}", replica.plaintext);
        LomsClient::new(Channel::from_shared(address).unwrap().connect_lazy())
    };
    let mut without_roles = both.clone();
    without_roles["roles"] = Value::Null;
    let open = Replica::start(&stack, &without_roles).await;
    assert_eq!(on_sale(plain(&open)).await.unwrap(), 0);
    assert_eq!(on_sale(open.stranger()).await.unwrap(), 0);
    let refused = receive(plain(&open), "d1").await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
    open.stop().await;

    // as shipped everybody has a role; not there
    let with_roles = Replica::start(&stack, &both).await;
    assert_eq!(on_sale(with_roles.stranger()).await.unwrap(), 0);
    let refused = on_sale(plain(&with_roles)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused:?}");
    with_roles.stop().await;

    for refused in [
        json!({"tls": {"client_auth": "required"}, "admin": {"listen": "127.0.0.1:0"}}),
        json!({"tls": {"enabled": false, "client_auth": "none"}, "roles": null}),
    ] {
        let mut settings = both.clone();
        devstack::service::merge(&mut settings, &refused);
        let refused = Replica::refused(&stack, &settings).await;
        assert_eq!(refused.status.code(), Some(64), "{refused:?}");
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(said.contains("grpc.plaintext_listen"), "{said}");
    }
    stack.stop().await.unwrap();
}
