//! The service under test, between its stand-ins. Finish it: that checks that orders and purchases agree.

use std::{collections::HashMap, future::Future, net::SocketAddr, ops::Range, time::Duration};

use checkout::{app::App, config::Config};
use proto::cart::{
    AddToCartRequest, DeleteFromCartRequest, ListCartRequest, ListCartResponse, PurchaseRequest,
    cart_client::CartClient,
};
use serde_json::{Value, json};
use sqlx::{PgPool, Row as _};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Request, Status,
    transport::{Channel, Identity},
};
use tonic_types::StatusExt as _;

use crate::{
    loms_stub::LomsStub,
    products_stub::{ProductsStub, TOKEN},
};

pub(crate) struct TestApp {
    pub(crate) loms: LomsStub,
    pub(crate) products: ProductsStub,
    pub(crate) pool: PgPool,
    client: CartClient<Channel>,
    http: SocketAddr,
    running: JoinSet<anyhow::Result<()>>,
    _neighbours: JoinSet<()>,
    stop: CancellationToken,
    finished: bool,
}

/// The stand-ins alone, for a service that runs as a process.
pub(crate) struct Neighbours {
    pub(crate) loms: LomsStub,
    pub(crate) products: ProductsStub,
    pub(crate) addresses: [SocketAddr; 2],
    pub(crate) serving: JoinSet<()>,
}

impl Neighbours {
    pub(crate) async fn start() -> Self {
        let mut serving = JoinSet::new();
        let products = ProductsStub::start(&mut serving).await;
        Self::beside(products, serving).await
    }

    /// With a LOMS that speaks TLS.
    pub(crate) async fn with_tls(identity: Identity) -> Self {
        let mut serving = JoinSet::new();
        let (products, products_address) = ProductsStub::start(&mut serving).await;
        let (loms, loms_address) = LomsStub::start_with(&mut serving, Some(identity)).await;
        Self {
            loms,
            products,
            addresses: [loms_address, products_address],
            serving,
        }
    }

    /// With a ProductService that was started by itself.
    pub(crate) async fn beside(
        (products, products_address): (ProductsStub, SocketAddr),
        mut serving: JoinSet<()>,
    ) -> Self {
        let (loms, loms_address) = LomsStub::start(&mut serving).await;
        Self {
            loms,
            products,
            addresses: [loms_address, products_address],
            serving,
        }
    }
}

/// A config for the database of `pool`, with `changes` to the usual one.
pub(crate) fn config(pool: &PgPool, [loms, products]: [SocketAddr; 2], changes: &Value) -> Value {
    let mut config = json!({
        "token": TOKEN,
        "services": {"loms": loms.to_string(), "products": products.to_string()},
        "postgres": {"connection_string": testkit::url(pool)},
        "grpc": {"listen": "127.0.0.1:0"},
        "http": {"listen": "127.0.0.1:0"},
        "tls": {"enabled": false},
        "limits": {"request_timeout": "5s"},
        "purchases": {"first_backoff": "50ms", "most_backoff": "200ms", "poll": "50ms"},
    });
    merge(&mut config, changes);
    config
}

fn merge(into: &mut Value, from: &Value) {
    match (into, from) {
        (Value::Object(into), Value::Object(from)) => {
            for (key, value) in from {
                merge(into.entry(key.clone()).or_insert(Value::Null), value);
            }
        }
        (into, from) => *into = from.clone(),
    }
}

/// Fills a user's first cart with one unit of each SKU, however LOMS is.
pub(crate) async fn fill(pool: &PgPool, user: i64, skus: &Range<u32>) {
    let filled = "WITH cart AS (INSERT INTO checkout.cart (user_id) VALUES ($1) RETURNING id)
                  INSERT INTO checkout.cart_item (cart_id, sku, count)
                  SELECT id, sku, 1 FROM cart, generate_series($2::bigint, $3::bigint) AS sku";
    let filled = sqlx::query(filled).bind(user).bind(i64::from(skus.start));
    let filled = filled.bind(i64::from(skus.end) - 1);
    filled.execute(pool).await.unwrap();
}

/// No worker comes to help: what is finished, a call has finished.
pub(crate) fn no_worker() -> Value {
    json!({"purchases": {"first_backoff": "1h", "most_backoff": "1h", "resume_after": "1h"}})
}

impl TestApp {
    pub(crate) async fn start(pool: PgPool) -> Self {
        Self::start_with(pool, json!({})).await
    }

    pub(crate) async fn start_with(pool: PgPool, changes: Value) -> Self {
        Self::beside(Neighbours::start().await, pool, changes).await
    }

    pub(crate) async fn beside(neighbours: Neighbours, pool: PgPool, changes: Value) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let Neighbours {
            loms,
            products,
            addresses,
            serving,
        } = neighbours;
        let config: Config = serde_json::from_value(config(&pool, addresses, &changes)).unwrap();
        let app = App::bind(config).await.unwrap();
        let (grpc, http) = (app.grpc_addr(), app.http_addr());
        let (stop, mut running) = (CancellationToken::new(), JoinSet::new());
        running.spawn(app.run(stop.clone().cancelled_owned()));
        let client = connect(grpc).await;
        Self {
            loms,
            products,
            pool,
            client,
            http,
            running,
            _neighbours: serving,
            stop,
            finished: false,
        }
    }

    pub(crate) fn client(&self) -> CartClient<Channel> {
        self.client.clone()
    }

    pub(crate) async fn add(&self, user: i64, sku: u32, count: u32) -> Result<(), Status> {
        let request = AddToCartRequest { user, sku, count };
        self.client().add_to_cart(request).await.map(drop)
    }

    pub(crate) async fn delete(&self, user: i64, sku: u32, count: u32) -> Result<(), Status> {
        let request = DeleteFromCartRequest { user, sku, count };
        self.client().delete_from_cart(request).await.map(drop)
    }

    pub(crate) async fn list(&self, user: i64) -> Result<ListCartResponse, Status> {
        let listed = self.client().list_cart(ListCartRequest { user }).await;
        listed.map(tonic::Response::into_inner)
    }

    /// The cart as SKU and count.
    pub(crate) async fn cart(&self, user: i64) -> Vec<(u32, u32)> {
        let listed = self.list(user).await.unwrap();
        listed
            .items
            .iter()
            .map(|item| (item.sku, item.count))
            .collect()
    }

    pub(crate) async fn purchase(&self, user: i64) -> Result<i64, Status> {
        self.purchase_with(user, "").await
    }

    pub(crate) async fn purchase_with(&self, user: i64, key: &str) -> Result<i64, Status> {
        let request = purchase_request(user, key);
        self.client()
            .purchase(request)
            .await
            .map(|response| response.into_inner().order_id)
    }

    /// Purchase with a caller who waits no longer than this.
    pub(crate) async fn purchase_within(
        &self,
        user: i64,
        allowed: Duration,
    ) -> Result<i64, Status> {
        let mut request = Request::new(purchase_request(user, ""));
        request.set_timeout(allowed);
        self.client()
            .purchase(request)
            .await
            .map(|response| response.into_inner().order_id)
    }

    /// Posts a body to the HTTP door.
    pub(crate) async fn post(&self, path: &str, body: impl Into<String>) -> (u16, Value) {
        let answer = post(self.http, path, body.into(), &[]).await;
        assert!(answer.headers()["x-trace-id"].len() == 32);
        (
            answer.status().as_u16(),
            serde_json::from_str(&answer.text().await.unwrap()).unwrap(),
        )
    }

    /// The gRPC code of a call through the HTTP door, which has no timer of its own, by a caller who waits so long.
    pub(crate) async fn code(&self, path: &str, body: Value, wait: Option<Duration>) -> Code {
        let wait = wait.map(|wait| format!("{}m", wait.as_millis()));
        let headers: Vec<_> = wait
            .iter()
            .map(|wait| ("grpc-timeout", wait.as_str()))
            .collect();
        let answer = post(self.http, path, body.to_string(), &headers).await;
        if answer.status() == 200 {
            return Code::Ok;
        }
        let body: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
        Code::from_i32(body["code"].as_i64().unwrap().try_into().unwrap())
    }

    pub(crate) async fn get(&self, path: &str) -> reqwest::Response {
        reqwest::get(format!("http://{}{path}", self.http))
            .await
            .unwrap()
    }

    pub(crate) async fn open_purchases(&self) -> i64 {
        count_open(&self.pool).await
    }

    /// Stops the service and checks that it kept its word.
    pub(crate) async fn finish(mut self) {
        self.finished = true;
        self.stop.cancel();
        let ended = tokio::time::timeout(Duration::from_secs(60), self.running.join_next()).await;
        ended
            .expect("it stops")
            .unwrap()
            .unwrap()
            .expect("a clean stop");
        assert_consistent(&self.pool, &self.loms).await;
    }
}

impl Drop for TestApp {
    fn drop(&mut self) {
        assert!(
            self.finished || std::thread::panicking(),
            "finish() the app, it checks"
        );
    }
}

pub(crate) async fn connect(grpc: SocketAddr) -> CartClient<Channel> {
    let endpoint = Channel::from_shared(format!("http://{grpc}")).unwrap();
    CartClient::new(endpoint.connect_lazy())
}

pub(crate) async fn post(
    http: SocketAddr,
    path: &str,
    body: String,
    headers: &[(&str, &str)],
) -> reqwest::Response {
    let request = reqwest::Client::new().post(format!("http://{http}{path}"));
    let request = headers.iter().fold(request, |request, (name, value)| {
        request.header(*name, *value)
    });
    request.body(body).send().await.unwrap()
}

pub(crate) fn purchase_request(user: i64, key: &str) -> PurchaseRequest {
    PurchaseRequest {
        user,
        idempotency_key: key.to_owned(),
    }
}

pub(crate) async fn count_open(pool: &PgPool) -> i64 {
    let open = "SELECT count(*) FROM checkout.purchase WHERE closed_at IS NULL";
    sqlx::query_scalar(open).fetch_one(pool).await.unwrap()
}

/// Nothing is open, the orders that hold or sold units are exactly the purchases that were made, one each.
pub(crate) async fn assert_consistent(pool: &PgPool, loms: &LomsStub) {
    assert_eq!(count_open(pool).await, 0, "purchases left open");
    let rows = sqlx::query(
        "SELECT order_id FROM checkout.purchase WHERE outcome = 'made' ORDER BY order_id",
    );
    let made: Vec<i64> = rows
        .fetch_all(pool)
        .await
        .unwrap()
        .iter()
        .map(|row| row.get(0))
        .collect();
    let living = |status: &str| status == "awaiting payment" || status == "payed";
    let orders: Vec<i64> = loms
        .orders()
        .iter()
        .filter(|order| living(&order.status))
        .map(|order| order.id)
        .collect();
    assert_eq!(made, orders, "purchases made and orders living");
}

/// Waits for a condition, longer than a purchase is left alone that could not even be put off, on a busy machine.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let bound = tokio::time::Instant::now() + Duration::from_secs(120);
    while !condition().await {
        assert!(
            tokio::time::Instant::now() < bound,
            "waited in vain: {what}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The stable reason of a refusal and what comes with it.
pub(crate) fn reason(status: &Status) -> (String, HashMap<String, String>) {
    let info = status.get_details_error_info().expect("an ErrorInfo");
    assert_eq!(info.domain, "marketplace");
    (info.reason, info.metadata)
}

#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(
    answer: Result<T, Status>,
    code: Code,
    why: &str,
) -> HashMap<String, String> {
    let status = answer.expect_err("a refusal");
    assert_eq!(status.code(), code, "{status:?}");
    let (reason, metadata) = reason(&status);
    assert_eq!(reason, why);
    metadata
}
