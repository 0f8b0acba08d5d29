//! What a caller gets who asks for something wrong: the table of the contract, in short.

use anyhow::{Context as _, Result};
use proto::{
    cart::{AddToCartRequest, DeleteFromCartRequest, PurchaseRequest},
    loms::{CreateOrderRequest, ListOrderRequest, OrderItem, StocksRequest},
    notifications::{Date, GetHistoryWithPeriodRequest},
};
use serde_json::json;
use tonic::Code;
use tonic_types::StatusExt as _;

use super::{HEART, Walk};
use crate::clients::{Clients, Door, period_around_now};

const NOBODY: i64 = 7;
/// More than a body may have on any route.
const TOO_LARGE: usize = 5 << 20;

/// Over gRPC: codes, reasons, every bad field at once.
pub(super) async fn over_grpc(walk: &mut Walk, clients: &mut Clients) -> Result<()> {
    walk.step("Bad input over gRPC");
    to_checkout(walk, clients).await?;
    to_loms(walk, clients).await?;
    to_notifications(walk, clients).await
}

async fn to_checkout(walk: &mut Walk, clients: &mut Clients) -> Result<()> {
    let answer = clients
        .cart
        .add_to_cart(AddToCartRequest {
            user: 0,
            sku: 0,
            count: 0,
        })
        .await;
    let status = walk.refused(
        "AddToCart with nothing right",
        answer,
        Code::InvalidArgument,
        "",
    )?;
    let violations = status
        .get_details_bad_request()
        .map(|bad| bad.field_violations)
        .unwrap_or_default();
    let mut fields: Vec<_> = violations
        .iter()
        .map(|violation| violation.field.as_str())
        .collect();
    fields.sort_unstable();
    walk.check(
        "all the bad fields at once",
        fields,
        vec!["count", "sku", "user"],
    )?;

    let answer = clients
        .cart
        .purchase(PurchaseRequest {
            user: NOBODY,
            ..Default::default()
        })
        .await;
    walk.refused(
        "Purchase of an empty cart",
        answer,
        Code::FailedPrecondition,
        "EMPTY_CART",
    )?;
    let answer = clients
        .cart
        .delete_from_cart(DeleteFromCartRequest {
            user: NOBODY,
            sku: HEART,
            count: 1,
        })
        .await;
    walk.refused_without_reason(
        "DeleteFromCart of what is not there",
        answer,
        Code::NotFound,
    )
}

async fn to_loms(walk: &mut Walk, clients: &mut Clients) -> Result<()> {
    let items = vec![
        OrderItem {
            sku: HEART,
            count: 40_000
        };
        2
    ];
    let answer = clients
        .loms
        .create_order(CreateOrderRequest {
            user: NOBODY,
            items,
            ..Default::default()
        })
        .await;
    walk.refused(
        "CreateOrder of 2 x 40000 units",
        answer,
        Code::InvalidArgument,
        "",
    )?;
    let answer = clients
        .loms
        .list_order(ListOrderRequest { order_id: i64::MAX })
        .await;
    walk.refused_without_reason("ListOrder of an order that is not", answer, Code::NotFound)?;
    let answer = clients.loms.stocks(StocksRequest { sku: 1 }).await;
    let stocks = walk.accepted("Stocks of an unknown SKU", answer)?.stocks;
    walk.check("its stocks", stocks, Vec::new())
}

async fn to_notifications(walk: &mut Walk, clients: &mut Clients) -> Result<()> {
    let (from, to) = period_around_now();
    for (what, from, to) in [
        (
            "a history from a day that does not exist",
            Date {
                year: 2026,
                month: 2,
                day: 30,
            },
            to,
        ),
        ("a history that ends before it begins", to, from),
    ] {
        let request = GetHistoryWithPeriodRequest {
            user: NOBODY,
            from: Some(from),
            to: Some(to),
            ..Default::default()
        };
        let answer = clients.notifications.get_history_with_period(request).await;
        walk.refused(what, answer, Code::InvalidArgument, "")?;
    }
    Ok(())
}

/// Over HTTP: what a gateway answers, and the service goes on.
pub(super) async fn over_http(walk: &mut Walk, clients: &Clients) -> Result<()> {
    walk.step("Bad input over HTTP");
    let http = &clients.http;
    let door = Door::Checkout;
    let answer = http
        .post_text(door, "/addToCart", "{\"user\":".to_owned())
        .await?;
    walk.answered("malformed JSON", &answer, 400, 3)?;
    let answer = http
        .post(door, "/addToCart", &json!({"user": "one"}))
        .await?;
    walk.answered("a wrong type", &answer, 400, 3)?;
    let answer = http.post(door, "/addToCart", &json!({})).await?;
    walk.answered("a body without fields", &answer, 400, 3)?;
    let answer = http
        .post_text(door, "/addToCart", format!("\"{}\"", "x".repeat(TOO_LARGE)))
        .await?;
    walk.answered("a body of 5 MiB", &answer, 413, 8)?;
    let answer = http.get(door, "/addToCart").await?;
    walk.answered("GET", &answer, 405, 12)?;
    let allow = answer
        .headers
        .get("allow")
        .context("no Allow header")?
        .to_str()?;
    walk.check("Allow", allow, "POST")?;
    let answer = http.post(door, "/nowhere", &json!({})).await?;
    walk.answered("an unknown path", &answer, 404, 5)?;
    let answer = http
        .post(door, "/purchase", &json!({"user": NOBODY}))
        .await?;
    walk.answered("an empty cart", &answer, 400, 9)?;
    walk.check("its reason", answer.reason(), Some("EMPTY_CART"))?;
    let answer = http
        .post(Door::Loms, "/listOrder", &json!({"orderID": "999999"}))
        .await?;
    walk.answered("an unknown order", &answer, 404, 5)?;
    let trace = answer.headers.get("x-trace-id").map(|id| id.len());
    walk.check("digits of x-trace-id", trace, Some(32))?;
    let answer = http.get(door, "/healthz").await?;
    walk.check("checkout goes on", answer.status, 200)
}
