//! A whole purchase over HTTP/JSON, as clients of grpc-gateway speak it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{HISTORY_BOUND, LANTERN, Walk, on_sale};
use crate::clients::{Answer, Clients, Door, period_around_now};

const USER: i64 = 6;

/// AddToCart to the history, every route of the three services on the way.
pub(super) async fn purchase(walk: &mut Walk, clients: &mut Clients) -> Result<()> {
    walk.step("The same over HTTP/JSON: the cart");
    let before = on_sale(clients, LANTERN).await?;
    let user = json!({"user": USER});
    let post = Post(clients.clone());
    post.ok(
        walk,
        Door::Checkout,
        "/addToCart",
        json!({"user": USER, "sku": LANTERN, "count": 5}),
    )
    .await?;
    post.ok(
        walk,
        Door::Checkout,
        "/deleteFromCart",
        json!({"user": USER, "sku": LANTERN, "count": 3}),
    )
    .await?;
    let listed = post
        .ok(walk, Door::Checkout, "/listCart", user.clone())
        .await?;
    let item = json!({"sku": LANTERN, "count": 2, "name": "White Metal Lantern", "price": 339});
    walk.check(
        "the cart",
        &listed.body,
        &json!({"items": [item], "totalPrice": 678}),
    )?;
    let old_route = post
        .ok(walk, Door::Checkout, "/listCartRequest", user.clone())
        .await?;
    walk.check(
        "the same at the old route",
        old_route.body == listed.body,
        true,
    )?;

    walk.step("The same over HTTP/JSON: the purchase, with 64-bit numbers as strings");
    let bought = post.ok(walk, Door::Checkout, "/purchase", user).await?;
    let order = bought.body["orderID"]
        .as_str()
        .context("orderID is no string")?
        .to_owned();
    let listed = post
        .ok(walk, Door::Loms, "/listOrder", json!({"orderID": order}))
        .await?;
    let status = listed.body["status"].as_str();
    walk.check("status", status, Some("awaiting payment"))?;
    post.ok(walk, Door::Loms, "/orderPayed", json!({"orderID": order}))
        .await?;
    let stocks = post
        .ok(walk, Door::Loms, "/stocks", json!({"sku": LANTERN}))
        .await?;
    walk.check("on sale", units(&stocks.body), before - 2)?;
    past_the_cart(walk, &post).await?;

    let statuses = history(&post, &order).await?;
    let expected: Vec<_> = ["new", "awaiting payment", "payed"]
        .map(str::to_owned)
        .into();
    walk.check("POST /history", statuses, expected)
}

async fn past_the_cart(walk: &mut Walk, post: &Post) -> Result<()> {
    walk.step("The same over HTTP/JSON: an order past the cart, cancelled");
    let body = json!({"user": USER, "items": [{"sku": LANTERN, "count": 1}]});
    let placed = post.ok(walk, Door::Loms, "/createOrder", body).await?;
    walk.check(
        "status",
        placed.body["status"].as_str(),
        Some("awaiting payment"),
    )?;
    let second = json!({"orderID": placed.body["orderID"]});
    post.ok(walk, Door::Loms, "/cancelOrder", second.clone())
        .await?;
    let listed = post.ok(walk, Door::Loms, "/listOrder", second).await?;
    walk.check("status", listed.body["status"].as_str(), Some("cancelled"))
}

/// The statuses that `/history` has of an order, as soon as the last one is there.
async fn history(post: &Post, order: &str) -> Result<Vec<String>> {
    let (from, to) = period_around_now();
    let body = json!({"user": USER, "from": from, "to": to});
    let by = Instant::now() + HISTORY_BOUND;
    loop {
        let answer = post
            .0
            .http
            .post(Door::Notifications, "/history", &body)
            .await?;
        let messages = answer.body["messages"]
            .as_array()
            .with_context(|| format!("no messages in {}", answer.body))?;
        let of_order = messages
            .iter()
            .filter(|message| field(message, "orderId", "order_id") == order);
        let told: Vec<_> = of_order
            .filter_map(|message| message["status"].as_str().map(str::to_owned))
            .collect();
        if told.len() >= 3 || Instant::now() > by {
            return Ok(told);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A field in proto3 JSON's own spelling, or in the proto file's.
fn field<'a>(message: &'a Value, json: &str, proto: &str) -> &'a str {
    message[json]
        .as_str()
        .or_else(|| message[proto].as_str())
        .unwrap_or_default()
}

/// Units over all warehouses; counts are strings.
fn units(stocks: &Value) -> u64 {
    let counts = stocks["stocks"].as_array().into_iter().flatten();
    counts
        .filter_map(|stock| stock["count"].as_str()?.parse::<u64>().ok())
        .sum()
}

struct Post(Clients);

impl Post {
    async fn ok(&self, walk: &mut Walk, door: Door, path: &str, body: Value) -> Result<Answer> {
        let answer = self.0.http.post(door, path, &body).await?;
        walk.answered(&format!("POST {path} {body}"), &answer, 200, 0)?;
        walk.show(&answer.body.to_string());
        Ok(answer)
    }
}
