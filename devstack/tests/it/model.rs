//! What a folder of orders must give, from a model that knows nothing of the services: the orders one after another on
//! paper. The whole retail folder is held against its own expectation first.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
};

use devstack::retail::{Folder, Line};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// The retail folder of this crate.
pub(crate) const RETAIL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/retail");

type Stock = BTreeMap<u32, u64>;

fn received(folder: &Folder) -> Stock {
    let mut stock: Stock = folder
        .products
        .iter()
        .map(|product| (product.sku, 0))
        .collect();
    for line in &folder.stock {
        *stock.entry(line.sku).or_default() += line.count;
    }
    stock
}

fn summed(lines: &[Line]) -> Stock {
    let mut units = Stock::new();
    for line in lines {
        *units.entry(line.sku).or_default() += u64::from(line.count);
    }
    units
}

fn covers(stock: &Stock, units: &Stock) -> bool {
    units
        .iter()
        .all(|(sku, count)| stock.get(sku).is_some_and(|left| left >= count))
}

fn take(stock: &mut Stock, units: &Stock) {
    for (sku, count) in units {
        *stock.get_mut(sku).expect("covered") -= count;
    }
}

fn left(stock: &Stock) -> (u64, String) {
    let text: Vec<_> = stock
        .iter()
        .map(|(sku, count)| format!("{sku},{count}"))
        .collect();
    let digest = Sha256::digest(text.join("\n"));
    (
        stock.values().sum(),
        digest.iter().map(|byte| format!("{byte:02x}")).collect(),
    )
}

/// The folder's `expected.json`.
pub(crate) fn expected(folder: &Folder) -> Value {
    let lines = folder
        .orders
        .iter()
        .map(|order| order.lines.len())
        .sum::<usize>();
    let (through_the_cart, repeated) = through_the_cart(folder);
    json!({
        "orders": folder.orders.len(),
        "lines": lines,
        "skus": received(folder).len(),
        "repeated_sku_lines": repeated,
        "through_the_cart": through_the_cart,
        "straight_to_loms": straight_to_loms(folder),
    })
}

fn through_the_cart(folder: &Folder) -> (Value, u64) {
    let mut stock = received(folder);
    let (mut payed, mut empty, mut refused, mut sold, mut repeated) = (0, 0, 0, 0, 0);
    for order in &folder.orders {
        let mut cart: Vec<Line> = Vec::new();
        for line in &order.lines {
            let in_cart: HashSet<u32> = cart.iter().map(|line| line.sku).collect();
            repeated += u64::from(in_cart.contains(&line.sku));
            cart.push(*line);
            let of_this: Vec<_> = cart
                .iter()
                .copied()
                .filter(|other| other.sku == line.sku)
                .collect();
            if !covers(&stock, &summed(&of_this)) {
                cart.pop();
                refused += 1;
            }
        }
        if cart.is_empty() {
            empty += 1;
        } else {
            payed += 1;
            take(&mut stock, &summed(&cart));
            sold += summed(&cart).values().sum::<u64>();
        }
    }
    let (stock_left, sha256) = left(&stock);
    let section = json!({
        "payed": payed,
        "empty_carts": empty,
        "refused_lines": refused,
        "units_sold": sold,
        "stock_left": stock_left,
        "stock_left_sha256": sha256,
    });
    (section, repeated)
}

fn straight_to_loms(folder: &Folder) -> Value {
    let mut stock = received(folder);
    let (mut payed, mut failed) = (0, 0);
    for order in &folder.orders {
        let units = summed(&order.lines);
        if covers(&stock, &units) {
            payed += 1;
            take(&mut stock, &units);
        } else {
            failed += 1;
        }
    }
    let (stock_left, sha256) = left(&stock);
    json!({"payed": payed, "failed": failed, "stock_left": stock_left, "stock_left_sha256": sha256})
}

#[test]
fn the_model_agrees_with_the_folder() {
    let folder = Folder::read(Path::new(RETAIL)).unwrap();
    let text = std::fs::read_to_string(Path::new(RETAIL).join("expected.json")).unwrap();
    assert_eq!(
        expected(&folder),
        serde_json::from_str::<Value>(&text).unwrap()
    );
}
