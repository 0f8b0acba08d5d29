//! A LOMS that is attacked, and its caller beside the attack.

use std::ops::Deref;

use prost::Message as _;
use proto::loms::{
    CreateOrderRequest, ListOrderRequest, OrderItem, StocksRequest, loms_client::LomsClient,
};
use serde_json::json;
use testkit::{
    attack::{Attacked, post},
    http2::Raw,
};
use tonic::transport::Channel;

use crate::{
    kafka,
    process::{File, LOMS, config, run},
    test_app::eventually,
};

/// A LOMS with an order of many lines.
pub(crate) struct Target {
    attacked: Attacked,
    client: LomsClient<Channel>,
    pub(crate) large: i64,
    /// Its database lives as long.
    pub(crate) pool: sqlx::PgPool,
}

impl Deref for Target {
    type Target = Attacked;

    fn deref(&self) -> &Attacked {
        &self.attacked
    }
}

impl Target {
    pub(crate) async fn start(limits: serde_json::Value) -> Target {
        rustls::crypto::ring::default_provider()
            .install_default()
            .ok();
        let pool = crate::database().await;
        let topic = kafka::unused_topic();
        kafka::create_topic(&topic).await;
        let config = config(&pool, &topic, &json!({"limits": limits}));
        let stock = (1..=1_000).fold("warehouse_id,sku,count\n".to_owned(), |csv, sku| {
            csv + &format!("1,{sku},100000\n")
        });
        let stock = File::new(&stock);
        let received = run(&config, &["stock", "receive", stock.path()]).await;
        assert!(received.status.success(), "{received:?}");
        let process = testkit::Process::start(LOMS, &config, "").await;
        let (grpc, http) = (process.grpc(), process.http());
        let connect = move || {
            let endpoint = Channel::from_shared(format!("http://{grpc}")).unwrap();
            LomsClient::new(endpoint.connect_lazy())
        };
        let mut client = connect();
        let items = (1..=1_000).map(|sku| OrderItem { sku, count: 60_000 });
        let order = CreateOrderRequest {
            user: 1,
            items: items.collect(),
            idempotency_key: String::new(),
        };
        eventually("a database", async || {
            let stocks = StocksRequest { sku: 7 };
            client.clone().stocks(stocks).await.is_ok()
        })
        .await;
        let created = client.create_order(order).await.unwrap();
        let large = created.into_inner().order_id;
        let caller = move || {
            let (mut client, web) = (connect(), reqwest::Client::new());
            let url = format!("http://{http}/stocks");
            async move || {
                let stocks = client.stocks(StocksRequest { sku: 7 }).await;
                stocks.map_err(|status| status.to_string())?;
                post(&web, &url, &json!({"sku": 7})).await
            }
        };
        Target {
            attacked: Attacked::start("loms", (process, config), caller).await,
            client,
            large,
            pool,
        }
    }

    pub(crate) async fn raw(&self, path: &str) -> Raw {
        Raw::connect(self.grpc(), path, &[]).await
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
        let mut client = self.client.clone();
        let listed = client.list_order(ListOrderRequest { order_id });
        assert_eq!(listed.await.unwrap().into_inner().items.len(), 1_000);
    }

    /// Others have not noticed, and its books are right.
    pub(crate) async fn finish(self) {
        let config = self.attacked.finish().await;
        let audit = run(&config, &["audit"]).await;
        assert!(audit.status.success(), "{audit:?}");
    }
}
