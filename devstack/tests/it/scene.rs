//! A stack whose checkout is between two lines, to its callers and to LOMS, and can be killed and started again.

use std::time::Duration;

use devstack::stack::Stack;
use proto::cart::cart_client::CartClient;
use serde_json::{Value, json};
use sqlx::PgPool;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use crate::{
    line::Line,
    test_stack::{TestStack, eventually},
};

/// A stack whose checkout reaches LOMS over one line and is reached over another.
pub(crate) struct Scene {
    pub(crate) stack: TestStack,
    pub(crate) to_loms: Line,
    pub(crate) to_checkout: Line,
    pub(crate) checkout: PgPool,
    loms: PgPool,
}

impl Scene {
    pub(crate) async fn set(stock: &[(i64, u32, u64)]) -> Self {
        let mut stack = TestStack::start(stock).await;
        let inner = stack.stack();
        let to_loms = Line::to(inner.service("loms").unwrap().grpc()).await;
        let to_checkout = Line::to(inner.service("checkout").unwrap().grpc()).await;
        let pool = async |service: &str| {
            PgPool::connect(inner.database(service).unwrap())
                .await
                .unwrap()
        };
        let (checkout, loms) = (pool("checkout").await, pool("loms").await);
        lead_over(inner, &to_loms);
        let mut scene = Self {
            stack,
            to_loms,
            to_checkout,
            checkout,
            loms,
        };
        scene.kill().await;
        scene.start_again().await;
        scene
    }

    /// A caller with a connection of his own.
    pub(crate) fn caller(&mut self) -> CartClient<Channel> {
        let ca = std::fs::read(self.stack.stack().ca()).unwrap();
        let tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca));
        let endpoint = Endpoint::from_shared(format!("https://{}", self.to_checkout.address));
        CartClient::new(endpoint.unwrap().tls_config(tls).unwrap().connect_lazy())
    }

    /// The order, where it is closed, of each purchase of the user.
    pub(crate) async fn purchases(&self, user: i64) -> Vec<Option<i64>> {
        let purchases =
            "SELECT order_id FROM checkout.purchase JOIN checkout.cart ON cart.id = cart_id
                         WHERE user_id = $1 ORDER BY order_id";
        let purchases = sqlx::query_scalar(purchases).bind(user);
        purchases.fetch_all(&self.checkout).await.unwrap()
    }

    /// Whether what the user began is finished.
    pub(crate) async fn is_closed(&self, user: i64) -> bool {
        let purchases = self.purchases(user).await;
        !purchases.is_empty() && purchases.iter().all(Option::is_some)
    }

    /// The user's orders.
    pub(crate) async fn orders(&self, user: i64) -> Vec<(i64, String)> {
        let orders = "SELECT id, status::text FROM loms.user_order WHERE user_id = $1 ORDER BY id";
        sqlx::query_as(orders)
            .bind(user)
            .fetch_all(&self.loms)
            .await
            .unwrap()
    }

    /// The units in the user's cart.
    pub(crate) async fn in_cart(&self, user: i64) -> i64 {
        let units = "SELECT COALESCE(sum(count), 0)::bigint FROM checkout.cart_item JOIN checkout.cart ON cart.id = cart_id
                     WHERE user_id = $1";
        let units = sqlx::query_scalar(units).bind(user);
        units.fetch_one(&self.checkout).await.unwrap()
    }

    pub(crate) async fn has_order(&self, user: i64) {
        eventually("LOMS has the order", async || {
            self.orders(user).await.len() == 1
        })
        .await;
    }

    /// `kill -9` of checkout.
    pub(crate) async fn kill(&mut self) {
        let (services, ..) = self.stack.stack().parts();
        services[0].kill().await.unwrap();
    }

    /// Checkout again, where it was.
    pub(crate) async fn start_again(&mut self) {
        let (services, ..) = self.stack.stack().parts();
        services[0].start_again().await.unwrap();
        let ready = services[0].wait_ready(Duration::from_secs(30));
        ready.await.unwrap();
    }

    /// As [`TestStack::finish`].
    pub(crate) async fn finish(self) {
        self.checkout.close().await;
        self.loms.close().await;
        self.stack.finish().await;
    }
}

/// Has checkout call LOMS over the line from its next start on, and finish what it finds soon after that.
fn lead_over(stack: &Stack, to_loms: &Line) {
    let file = stack.dir().join("checkout.yaml");
    let text = std::fs::read_to_string(&file).unwrap();
    let mut config: Value = serde_yaml::from_str(&text).unwrap();
    config["services"]["loms"] = json!(to_loms.address.to_string());
    config["purchases"] = json!({
        "resume_after": "1s", "first_backoff": "200ms", "most_backoff": "500ms", "poll": "100ms",
    });
    std::fs::write(&file, serde_yaml::to_string(&config).unwrap()).unwrap();
}
