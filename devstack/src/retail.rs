//! Folders of shop data as `data/retail` has them: a catalogue, the stock to receive, the orders in the order they came.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::Path,
};

use anyhow::{Context as _, Result};
use serde::{Deserialize, de::DeserializeOwned};

use crate::failure::Misuse;

/// The retail catalogue, in the executable so that it runs from anywhere.
pub const PRODUCTS_CSV: &str = include_str!("../data/retail/products.csv");
/// The stock that goes with it.
pub const STOCK_CSV: &str = include_str!("../data/retail/stock.csv");

/// A row of `products.csv`.
#[derive(Debug, Clone, Deserialize)]
pub struct Product {
    pub sku: u32,
    pub name: String,
    #[serde(rename = "price_pence")]
    pub price: u32,
}

/// A row of `stock.csv`.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct StockLine {
    pub warehouse_id: i64,
    pub sku: u32,
    pub count: u64,
}

/// A line of an order: units of a SKU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    pub sku: u32,
    pub count: u32,
}

/// An order as the shopper placed it: a SKU may be on several lines.
#[derive(Debug, Clone)]
pub struct Order {
    pub user: i64,
    pub lines: Vec<Line>,
}

/// A row of `orders.csv`; `placed_at` is for people.
#[derive(Deserialize)]
struct OrderRow {
    order: u64,
    user: i64,
    sku: u32,
    count: u32,
}

/// A whole folder.
#[derive(Debug)]
pub struct Folder {
    pub products: Vec<Product>,
    pub stock: Vec<StockLine>,
    pub orders: Vec<Order>,
}

impl Folder {
    /// Reads `products.csv`, `stock.csv` and `orders.csv`.
    pub fn read(dir: &Path) -> Result<Folder> {
        let rows: Vec<OrderRow> = read_file(&dir.join("orders.csv"))?;
        let mut orders = Vec::new();
        let mut current = None;
        for row in rows {
            if current != Some(row.order) {
                current = Some(row.order);
                orders.push(Order {
                    user: row.user,
                    lines: Vec::new(),
                });
            }
            if let Some(order) = orders.last_mut() {
                order.lines.push(Line {
                    sku: row.sku,
                    count: row.count,
                });
            }
        }
        let products = read_file(&dir.join("products.csv"))?;
        let stock = read_file(&dir.join("stock.csv"))?;
        Ok(Folder {
            products,
            stock,
            orders,
        })
    }

    /// Every SKU that the folder names, ascending.
    pub fn skus(&self) -> BTreeSet<u32> {
        self.products
            .iter()
            .map(|product| product.sku)
            .chain(self.stock.iter().map(|line| line.sku))
            .collect()
    }

    /// Units received, over all warehouses.
    pub fn units_received(&self) -> u64 {
        self.stock.iter().map(|line| line.count).sum()
    }

    /// Units received by SKU.
    pub fn received(&self) -> BTreeMap<u32, u64> {
        let mut received = BTreeMap::new();
        for line in &self.stock {
            *received.entry(line.sku).or_default() += line.count;
        }
        received
    }

    /// Lines for a SKU that the shopper's cart already holds, the orders played strictly one after another on paper:
    /// a refused line leaves nothing in the cart that a later one could repeat.
    pub fn repeated_sku_lines(&self) -> usize {
        let mut left = self.received();
        let mut repeated = 0;
        for order in &self.orders {
            let mut cart: HashMap<u32, u64> = HashMap::new();
            for line in &order.lines {
                repeated += usize::from(cart.contains_key(&line.sku));
                let wanted =
                    cart.get(&line.sku).copied().unwrap_or_default() + u64::from(line.count);
                if left.get(&line.sku).is_some_and(|units| *units >= wanted) {
                    cart.insert(line.sku, wanted);
                }
            }
            for (sku, count) in cart {
                left.entry(sku).and_modify(|units| *units -= count);
            }
        }
        repeated
    }
}

/// The catalogue in `text`, by SKU.
pub fn catalogue(text: &str) -> Result<BTreeMap<u32, Product>> {
    let products: Vec<Product> = rows(text.as_bytes())?;
    Ok(products
        .into_iter()
        .map(|product| (product.sku, product))
        .collect())
}

/// The rows of a file, or a misuse that names the file and the row.
pub fn read_file<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let shown = path.display();
    let bytes = std::fs::read(path).map_err(|error| {
        Misuse::error(
            format!("reading {shown}: {error}"),
            "name a file that is there",
        )
    })?;
    rows(&bytes)
        .map_err(|error| Misuse::error(format!("reading {shown}: {error:#}"), "correct the file"))
}

fn rows<T: DeserializeOwned>(bytes: &[u8]) -> Result<Vec<T>> {
    csv::Reader::from_reader(bytes)
        .into_deserialize()
        .collect::<Result<_, _>>()
        .context("parse csv")
}
