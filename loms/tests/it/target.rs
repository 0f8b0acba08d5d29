//! A LOMS that is attacked, a process of its own, and a caller beside the attack.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use prost::Message as _;
use proto::loms::{
    CreateOrderRequest, ListOrderRequest, OrderItem, StocksRequest, loms_client::LomsClient,
};
use serde_json::json;
use tonic::transport::Channel;

use crate::{
    frames::Raw,
    kafka,
    process::{File, Process},
    test_app::eventually,
};

/// What an attack may add to the memory of a process that has been asked once, in KiB.
const GROWTH: u64 = 96 * 1024;
/// The longest that a call of another client may take meanwhile.
const PROBE_BOUND: Duration = Duration::from_secs(3);

/// A LOMS with an order of many lines, and a caller beside the attack.
pub(crate) struct Target {
    pub(crate) process: Process,
    probe: LomsClient<Channel>,
    web: reqwest::Client,
    before: u64,
    pub(crate) large: i64,
    config: File,
    /// Its database lives as long.
    pub(crate) pool: sqlx::PgPool,
}

impl Target {
    pub(crate) async fn start(limits: serde_json::Value) -> Target {
        rustls::crypto::ring::default_provider()
            .install_default()
            .ok();
        let pool = crate::database().await;
        let topic = kafka::unused_topic();
        kafka::create_topic(&topic).await;
        let config = File::config(&pool, &topic, &json!({"limits": limits}));
        let stock = (1..=1_000).fold("warehouse_id,sku,count\n".to_owned(), |csv, sku| {
            csv + &format!("1,{sku},100000\n")
        });
        let stock = File::new(&stock);
        let received = crate::process::run(&config, &["stock", "receive", stock.path()]).await;
        assert!(received.status.success(), "{received:?}");
        let process = Process::start(&config).await;
        let mut probe = process.client();
        let items = (1..=1_000).map(|sku| OrderItem { sku, count: 60_000 });
        let order = CreateOrderRequest {
            user: 1,
            items: items.collect(),
            idempotency_key: String::new(),
        };
        eventually("a database", async || {
            probe.clone().stocks(StocksRequest { sku: 7 }).await.is_ok()
        })
        .await;
        let large = probe
            .create_order(order)
            .await
            .unwrap()
            .into_inner()
            .order_id;
        let target = Target {
            before: process.most_memory(),
            process,
            probe,
            web: reqwest::Client::new(),
            large,
            config,
            pool,
        };
        target.is_alive().await;
        target
    }

    pub(crate) fn grpc(&self) -> SocketAddr {
        self.process.grpc()
    }

    pub(crate) async fn raw(&self, path: &str) -> Raw {
        Raw::connect(self.grpc(), path, &[]).await
    }

    /// Others are answered in time, over both ports.
    pub(crate) async fn is_alive(&self) {
        for _ in 0..5 {
            let began = Instant::now();
            let mut probe = self.probe.clone();
            let stocks = probe.stocks(StocksRequest { sku: 7 }).await;
            stocks.expect("an answer beside the attack");
            assert!(began.elapsed() < PROBE_BOUND, "{:?}", began.elapsed());
        }
        let ready = format!("http://{}/readyz", self.process.http());
        let ready = self.web.get(ready).send().await.unwrap();
        assert_eq!(ready.status(), 200);
    }

    /// Calls of a method by their code, as the metrics count them.
    pub(crate) async fn counted(&self, status: &str, method: &str) -> u64 {
        let metrics = format!("http://{}/metrics", self.process.http());
        let metrics = self.web.get(metrics).send().await.unwrap();
        let metrics = metrics.text().await.unwrap();
        assert!(
            metrics.len() < 1 << 20,
            "{} bytes of metrics",
            metrics.len()
        );
        let name = format!(
            "loms_histogram_response_time_seconds_count{{method=\"{method}\",status=\"{status}\"}} "
        );
        let found = metrics.lines().find_map(|line| line.strip_prefix(&name));
        found.map_or(0, |count| count.parse().unwrap())
    }

    pub(crate) async fn orders_of_two(&self) -> i64 {
        let orders = "SELECT count(*) FROM loms.user_order WHERE user_id = 2";
        crate::oracle::count(&self.pool, orders).await
    }

    /// The message that asks for the order of many lines.
    pub(crate) fn ask_for_large(&self) -> Vec<u8> {
        let order_id = self.large;
        ListOrderRequest { order_id }.encode_to_vec()
    }

    pub(crate) async fn large_is_listed(&self) {
        let order_id = self.large;
        let mut probe = self.probe.clone();
        let listed = probe.list_order(ListOrderRequest { order_id });
        assert_eq!(listed.await.unwrap().into_inner().items.len(), 1_000);
    }

    /// It has not grown much, goes on, and its books are right.
    pub(crate) async fn finish(self) {
        self.is_alive().await;
        let grown = self.process.most_memory().saturating_sub(self.before);
        println!("{} MiB, {} more", self.before / 1024, grown / 1024);
        assert!(grown < GROWTH, "{grown} KiB");
        let config = self.config;
        let ended = self.process.stop().await;
        assert!(ended.success(), "{ended:?}");
        let audit = crate::process::run(&config, &["audit"]).await;
        assert!(audit.status.success(), "{audit:?}");
    }
}
