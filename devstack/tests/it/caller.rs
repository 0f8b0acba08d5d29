//! One caller of both doors, and what a refusal looks like from each: the same code, the same reason.

use std::fmt::Debug;

use devstack::clients::{Answer, Clients, Door, reason};
use proto::{
    cart::{AddToCartRequest, PurchaseRequest},
    loms::{
        CancelOrderRequest, CreateOrderRequest, CreateOrderResponse, OrderItem, OrderPayedRequest,
    },
};
use serde_json::{Value, json};
use tonic::{Code, Response, Status};

/// Both answers are the refusal `code`, with `why` as its reason, empty for none.
pub(crate) fn assert_refused<T: Debug>(
    grpc: Result<Response<T>, Status>,
    http: &Answer,
    code: Code,
    why: &str,
) {
    let status = grpc.expect_err("a refusal");
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (code, why),
        "{status:?}"
    );
    let expected = match code {
        Code::NotFound => 404,
        Code::AlreadyExists | Code::Aborted => 409,
        _ => 400,
    };
    let answered = (
        http.status,
        http.body["code"].as_i64(),
        http.reason().unwrap_or_default(),
    );
    assert_eq!(
        answered,
        (expected, Some(i64::from(i32::from(code))), why),
        "{}",
        http.body
    );
    assert_eq!(http.body["message"], status.message());
}

pub(crate) struct Caller(pub(crate) Clients);

impl Caller {
    pub(crate) async fn post(&self, door: Door, path: &str, body: Value) -> Answer {
        self.0.http.post(door, path, &body).await.unwrap()
    }

    pub(crate) async fn add(
        &self,
        user: i64,
        sku: u32,
        count: u32,
    ) -> Result<Response<pbjson_types::Empty>, Status> {
        self.0
            .cart
            .clone()
            .add_to_cart(AddToCartRequest { user, sku, count })
            .await
    }

    pub(crate) async fn purchase(&self, user: i64, key: &str) -> Result<i64, Status> {
        let request = PurchaseRequest {
            user,
            idempotency_key: key.to_owned(),
        };
        Ok(self
            .0
            .cart
            .clone()
            .purchase(request)
            .await?
            .into_inner()
            .order_id)
    }

    pub(crate) async fn create(
        &self,
        user: i64,
        items: &[(u32, u32)],
        key: &str,
    ) -> Result<Response<CreateOrderResponse>, Status> {
        let items = items
            .iter()
            .map(|(sku, count)| OrderItem {
                sku: *sku,
                count: *count,
            })
            .collect();
        let request = CreateOrderRequest {
            user,
            items,
            idempotency_key: key.to_owned(),
        };
        self.0.loms.clone().create_order(request).await
    }

    pub(crate) async fn pay(&self, order_id: i64) -> Result<Response<pbjson_types::Empty>, Status> {
        self.0
            .loms
            .clone()
            .order_payed(OrderPayedRequest { order_id })
            .await
    }

    pub(crate) async fn cancel(
        &self,
        order_id: i64,
    ) -> Result<Response<pbjson_types::Empty>, Status> {
        self.0
            .loms
            .clone()
            .cancel_order(CancelOrderRequest { order_id })
            .await
    }
}

pub(crate) fn items(lines: &[(u32, u32)]) -> Value {
    lines
        .iter()
        .map(|(sku, count)| json!({"sku": sku, "count": count}))
        .collect()
}
