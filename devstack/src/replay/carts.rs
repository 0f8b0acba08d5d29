//! Whether carts are what their shoppers made of them: an order has what the cart held, a cart whose purchase failed
//! still holds it, and in the end every cart is empty.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use proto::{
    cart::{DeleteFromCartRequest, ListCartRequest},
    loms::ListOrderRequest,
};
use tonic::Code;

use crate::{
    clients::Clients,
    retail::{Folder, Line},
};

/// Hundreds of users are asked for, this many at a time.
const AT_ONCE: usize = 16;

/// Units by SKU.
type Units = BTreeMap<u32, u32>;

fn units(lines: impl IntoIterator<Item = (u32, u32)>) -> Units {
    let mut units = Units::new();
    for (sku, count) in lines {
        *units.entry(sku).or_default() += count;
    }
    units
}

fn held(cart: &[Line]) -> Units {
    units(cart.iter().map(|line| (line.sku, line.count)))
}

/// Where the order is not what the cart held.
pub(super) async fn ordered(
    clients: &mut Clients,
    order_id: i64,
    cart: &[Line],
) -> Result<Option<String>> {
    let order = clients.loms.list_order(ListOrderRequest { order_id }).await;
    let order = order.context("ListOrder")?.into_inner();
    let ordered = units(order.items.iter().map(|item| (item.sku, item.count)));
    let wrong = || {
        let held = held(cart);
        let skus: BTreeSet<_> = held.keys().chain(ordered.keys()).copied().collect();
        let differ = skus
            .into_iter()
            .filter(|sku| held.get(sku) != ordered.get(sku))
            .map(|sku| {
                let of = |units: &Units| units.get(&sku).copied().unwrap_or_default();
                format!(
                    "SKU {sku}: {} in the cart, {} ordered",
                    of(&held),
                    of(&ordered)
                )
            });
        let differ: Vec<_> = differ.collect();
        format!(
            "order {order_id} of user {}: {}",
            order.user,
            differ.join(", ")
        )
    };
    Ok((ordered != held(cart)).then(wrong))
}

/// Takes out of the cart exactly what must be in it: all but one unit of each line, then that one. Where it is not there.
pub(super) async fn give_up(
    clients: &mut Clients,
    user: i64,
    cart: &[Line],
) -> Result<Option<String>> {
    let mut missing = Vec::new();
    for (sku, units) in held(cart) {
        for count in [units - 1, 1].into_iter().filter(|count| *count > 0) {
            let request = DeleteFromCartRequest { user, sku, count };
            match clients.cart.delete_from_cart(request).await {
                Ok(_) => {}
                Err(status) if status.code() == Code::NotFound => {
                    missing.push(format!("fewer than {units} of SKU {sku}"));
                }
                Err(status) => return Err(status).context("DeleteFromCart"),
            }
        }
    }
    let wrong = || {
        format!(
            "cart of user {user} after a failed purchase: {}",
            missing.join(", ")
        )
    };
    Ok((!missing.is_empty()).then(wrong))
}

/// The users whose carts are not empty.
pub(super) async fn left(folder: &Folder, clients: &Clients) -> Result<Vec<String>> {
    let users: BTreeSet<_> = folder.orders.iter().map(|order| order.user).collect();
    let ask = |user| {
        let mut cart = clients.cart.clone();
        async move {
            let listed = cart.list_cart(ListCartRequest { user }).await;
            let lines = listed.context("ListCart")?.into_inner().items.len();
            anyhow::Ok(
                (lines > 0).then(|| format!("cart of user {user} in the end: {lines} lines")),
            )
        }
    };
    stream::iter(users)
        .map(ask)
        .buffered(AT_ONCE)
        .try_filter_map(async |wrong| Ok(wrong))
        .try_collect()
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repeated_sku_is_summed() {
        let line = |sku, count| Line { sku, count };
        let cart = [line(5, 1), line(3, 2), line(5, 4)];
        assert_eq!(held(&cart), Units::from([(3, 2), (5, 5)]));
    }
}
