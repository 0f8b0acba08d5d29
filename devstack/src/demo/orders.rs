//! Four orders over gRPC: one paid, one cancelled, one left unpaid, one that fails.

use std::time::Instant;

use anyhow::{Context as _, Result};
use proto::{
    cart::{AddToCartRequest, DeleteFromCartRequest, ListCartRequest, PurchaseRequest},
    loms::{CancelOrderRequest, OrderItem, OrderPayedRequest},
};
use tonic::Code;

use super::{EXPIRY_BOUND, HEART, JARS, LANTERN, Placed, Walk, list_order, on_sale};
use crate::{
    clients::{Clients, error_info},
    retail,
    stack::Stack,
};

const PAYING: i64 = 1;
const CANCELLING: i64 = 2;
const FORGETFUL: i64 = 3;
const FAST: i64 = 4;
const SLOW: i64 = 5;

/// Books the retail stock, and books it again, which must change nothing.
pub(super) async fn receive(walk: &mut Walk, stack: &Stack, clients: &mut Clients) -> Result<()> {
    walk.step("loms stock receive: the retail shop's stock, three warehouses");
    let received = retail_units(HEART)?;
    walk.show(&stack.receive_retail_stock().await?);
    walk.check(
        "White Hanging Heart on sale",
        on_sale(clients, HEART).await?,
        received,
    )?;
    walk.show(&stack.receive_retail_stock().await?);
    walk.check(
        "on sale after the same delivery again",
        on_sale(clients, HEART).await?,
        received,
    )
}

fn retail_units(sku: u32) -> Result<u64> {
    let mut rows = csv::Reader::from_reader(retail::STOCK_CSV.as_bytes());
    let lines = rows
        .deserialize()
        .collect::<Result<Vec<retail::StockLine>, _>>()
        .context("read the retail stock")?;
    Ok(lines
        .iter()
        .filter(|line| line.sku == sku)
        .map(|line| line.count)
        .sum())
}

async fn add(
    walk: &mut Walk,
    clients: &mut Clients,
    user: i64,
    sku: u32,
    count: u32,
) -> Result<()> {
    let answer = clients
        .cart
        .add_to_cart(AddToCartRequest { user, sku, count })
        .await;
    walk.accepted(&format!("AddToCart {count} x {sku}"), answer)
        .map(drop)
}

async fn purchase(walk: &mut Walk, clients: &mut Clients, user: i64) -> Result<i64> {
    let answer = clients
        .cart
        .purchase(PurchaseRequest {
            user,
            ..Default::default()
        })
        .await;
    let order = walk.accepted("Purchase", answer)?.order_id;
    walk.show(&format!("order {order}"));
    Ok(order)
}

async fn cart(clients: &mut Clients, user: i64) -> Result<Vec<(u32, u32)>> {
    let cart = clients
        .cart
        .list_cart(ListCartRequest { user })
        .await
        .context("ListCart")?
        .into_inner();
    Ok(cart
        .items
        .iter()
        .map(|item| (item.sku, item.count))
        .collect())
}

/// A cart filled, corrected, listed, bought and paid.
pub(super) async fn payed(walk: &mut Walk, clients: &mut Clients) -> Result<Placed> {
    fill_a_cart(walk, clients).await?;
    let order = buy(walk, clients).await?;
    pay(walk, clients, order).await?;
    Ok(Placed {
        order,
        user: PAYING,
        end: "payed",
    })
}

async fn fill_a_cart(walk: &mut Walk, clients: &mut Clients) -> Result<()> {
    walk.step("Cart: AddToCart, refused for want of stock, DeleteFromCart, ListCart");
    add(walk, clients, PAYING, HEART, 6).await?;
    add(walk, clients, PAYING, LANTERN, 4).await?;
    let too_many = AddToCartRequest {
        user: PAYING,
        sku: LANTERN,
        count: 60_000,
    };
    let answer = clients.cart.add_to_cart(too_many).await;
    walk.refused(
        "AddToCart of what nobody has",
        answer,
        Code::FailedPrecondition,
        "INSUFFICIENT_STOCK",
    )?;
    let one = DeleteFromCartRequest {
        user: PAYING,
        sku: LANTERN,
        count: 1,
    };
    let answer = clients.cart.delete_from_cart(one).await;
    walk.accepted("DeleteFromCart", answer)?;
    let answer = clients
        .cart
        .list_cart(ListCartRequest { user: PAYING })
        .await;
    let listed = walk.accepted("ListCart", answer)?;
    let items: Vec<_> = listed
        .items
        .iter()
        .map(|i| (i.sku, i.count, i.name.as_str(), i.price))
        .collect();
    let lantern = (LANTERN, 3, "White Metal Lantern", 339);
    let heart = (HEART, 6, "White Hanging Heart T-Light Holder", 255);
    walk.check(
        "items, with names and prices from ProductService",
        items,
        vec![lantern, heart],
    )?;
    walk.check("total", listed.total_price, 3 * 339 + 6 * 255)
}

async fn buy(walk: &mut Walk, clients: &mut Clients) -> Result<i64> {
    walk.step("Purchase: every unit reserved, out of the stock on sale");
    let before = on_sale(clients, HEART).await?;
    let order = purchase(walk, clients, PAYING).await?;
    let listed = list_order(clients, order).await?;
    walk.check("status", listed.status.as_str(), "awaiting payment")?;
    let mut items = listed.items;
    items.sort_by_key(|item| item.sku);
    let bought = [(LANTERN, 3), (HEART, 6)].map(|(sku, count)| OrderItem { sku, count });
    walk.check(
        "user and items",
        (listed.user, items),
        (PAYING, bought.to_vec()),
    )?;
    walk.check("on sale", on_sale(clients, HEART).await?, before - 6)?;
    walk.check("the cart", cart(clients, PAYING).await?, Vec::new())?;
    Ok(order)
}

async fn pay(walk: &mut Walk, clients: &mut Clients, order: i64) -> Result<()> {
    let before = on_sale(clients, HEART).await?;
    walk.step("OrderPayed: the reservation is written off");
    let answer = clients
        .loms
        .order_payed(OrderPayedRequest { order_id: order })
        .await;
    walk.accepted("OrderPayed", answer)?;
    let answer = clients
        .loms
        .order_payed(OrderPayedRequest { order_id: order })
        .await;
    walk.accepted("OrderPayed again", answer)?;
    walk.check(
        "status",
        list_order(clients, order).await?.status.as_str(),
        "payed",
    )?;
    walk.check("on sale", on_sale(clients, HEART).await?, before)?;
    let answer = clients
        .loms
        .cancel_order(CancelOrderRequest { order_id: order })
        .await;
    walk.refused_by_status("CancelOrder of what is paid", answer, "payed")
}

/// An order cancelled by its user before payment.
pub(super) async fn cancelled(walk: &mut Walk, clients: &mut Clients) -> Result<Placed> {
    walk.step("CancelOrder: a second order, its units back on sale");
    let before = on_sale(clients, HEART).await?;
    add(walk, clients, CANCELLING, HEART, 10).await?;
    let order = purchase(walk, clients, CANCELLING).await?;
    walk.check("on sale", on_sale(clients, HEART).await?, before - 10)?;
    let answer = clients
        .loms
        .cancel_order(CancelOrderRequest { order_id: order })
        .await;
    walk.accepted("CancelOrder", answer)?;
    let answer = clients
        .loms
        .cancel_order(CancelOrderRequest { order_id: order })
        .await;
    walk.accepted("CancelOrder again", answer)?;
    walk.check(
        "status",
        list_order(clients, order).await?.status.as_str(),
        "cancelled",
    )?;
    walk.check("on sale", on_sale(clients, HEART).await?, before)?;
    let answer = clients
        .loms
        .order_payed(OrderPayedRequest { order_id: order })
        .await;
    walk.refused_by_status("OrderPayed of what is cancelled", answer, "cancelled")?;
    Ok(Placed {
        order,
        user: CANCELLING,
        end: "cancelled",
    })
}

/// An order that nobody pays; [`expired`] sees its end.
pub(super) async fn left_unpaid(walk: &mut Walk, clients: &mut Clients) -> Result<Placed> {
    walk.step("A third order is left unpaid");
    add(walk, clients, FORGETFUL, LANTERN, 20).await?;
    let order = purchase(walk, clients, FORGETFUL).await?;
    walk.check(
        "status",
        list_order(clients, order).await?.status.as_str(),
        "awaiting payment",
    )?;
    Ok(Placed {
        order,
        user: FORGETFUL,
        end: "cancelled",
    })
}

/// Waits until LOMS has cancelled the order that nobody paid.
pub(super) async fn expired(walk: &mut Walk, clients: &mut Clients, unpaid: Placed) -> Result<()> {
    walk.step("The third order's time is up: LOMS cancels it by itself");
    let by = Instant::now() + EXPIRY_BOUND;
    let mut order = list_order(clients, unpaid.order).await?;
    while order.status == "awaiting payment" && Instant::now() < by {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        order = list_order(clients, unpaid.order).await?;
    }
    walk.check("status", order.status.as_str(), "cancelled")?;
    let history: Vec<_> = order
        .history
        .iter()
        .map(|h| (h.sequence, h.status.as_str(), h.actor.as_str()))
        .collect();
    walk.check(
        "history, with who did it",
        history,
        vec![
            (1, "new", "user"),
            (2, "awaiting payment", "user"),
            (3, "cancelled", "timeout"),
        ],
    )?;
    let received = retail_units(LANTERN)?;
    // the first order bought 3; the one over HTTP was paid for 2
    walk.check(
        "on sale",
        on_sale(clients, LANTERN).await?,
        received - 3 - 2,
    )
}

/// Two carts with the shop's only unit: the slower one's purchase fails and its cart stays.
pub(super) async fn failed(walk: &mut Walk, clients: &mut Clients) -> Result<Placed> {
    walk.step("A fourth order fails: another user was faster, and the cart is as it was");
    let before = on_sale(clients, HEART).await?;
    add(walk, clients, FAST, JARS, 1).await?;
    add(walk, clients, SLOW, JARS, 1).await?;
    add(walk, clients, SLOW, HEART, 2).await?;
    let bought = purchase(walk, clients, FAST).await?;
    let answer = clients
        .loms
        .order_payed(OrderPayedRequest { order_id: bought })
        .await;
    walk.accepted("OrderPayed", answer)?;
    let answer = clients
        .cart
        .purchase(PurchaseRequest {
            user: SLOW,
            ..Default::default()
        })
        .await;
    let refusal = "Purchase of what is gone";
    let status = walk.refused(
        refusal,
        answer,
        Code::FailedPrecondition,
        "INSUFFICIENT_STOCK",
    )?;
    let metadata = error_info(&status)
        .map(|info| info.metadata)
        .unwrap_or_default();
    walk.show(&format!("{metadata:?}"));
    let order = metadata
        .get("order_id")
        .context("the refusal does not name the order")?
        .parse()?;
    walk.check(
        "status",
        list_order(clients, order).await?.status.as_str(),
        "failed",
    )?;
    walk.check(
        "the cart",
        cart(clients, SLOW).await?,
        vec![(HEART, 2), (JARS, 1)],
    )?;
    walk.check(
        "on sale: nothing stays reserved",
        on_sale(clients, HEART).await?,
        before,
    )?;
    Ok(Placed {
        order,
        user: SLOW,
        end: "failed",
    })
}
