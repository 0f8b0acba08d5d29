//! What an import makes of all orders and all stock: its report, and the stock that its last
//! transaction writes. Pure.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
};

use super::decide::{ImportedOrder, OldOrder, UNKNOWN_WAREHOUSE, known};
use crate::{
    delivery::Delivery,
    order::{Sku, WarehouseId},
};

/// Rows that are named one by one; of more the number is enough.
const LISTED: usize = 20;

/// A row of stock of the system before, and what its orders hold of it.
pub(crate) struct OldStock {
    pub(crate) sku: i64,
    pub(crate) warehouse: i64,
    /// On sale: what is reserved has been taken out.
    pub(crate) count: i64,
    /// Of all reservations, whatever became of their orders.
    pub(crate) reserved: i64,
}

/// A row of stock as it is taken over.
pub(crate) struct ImportedStock {
    pub(crate) sku: Sku,
    pub(crate) warehouse: WarehouseId,
    pub(crate) on_sale: i64,
    /// How far below 0 it was.
    pub(crate) deficit: i64,
}

#[derive(Default)]
pub(crate) struct Plan {
    /// Orders by what they were and what they become.
    orders: BTreeMap<(String, &'static str), u64>,
    decided: u64,
    steps: u64,
    lines: u64,
    left_out: u64,
    without_lines: u64,
    /// Orders that held units which go back.
    releasing: u64,
    /// Units by SKU and warehouse that stay reserved, or are sold from there.
    kept: HashMap<(i64, i64), i64>,
    sold_before: BTreeMap<i64, i64>,
    reserved: i64,
    sold: i64,
    returned: i64,
    pub(crate) stock: Vec<ImportedStock>,
    /// Lines of orders that are not there.
    pub(crate) stray_lines: i64,
    /// The highest number that the system before has given.
    pub(crate) highest: i64,
    refused: Vec<String>,
    more_refused: u64,
}

impl Plan {
    pub(crate) fn note_order(&mut self, old: &OldOrder) {
        let order = match old.decide() {
            Ok(order) => order,
            Err(why) => return self.refuse(why),
        };
        let became = (old.status.clone(), order.status.as_str());
        *self.orders.entry(became).or_default() += 1;
        self.decided += u64::from(order.decided);
        self.steps += order.history.len() as u64;
        self.lines += order.items.len() as u64;
        self.left_out += order.left_out as u64;
        self.without_lines += u64::from(order.items.is_empty());
        self.releasing += u64::from(order.released > 0);
        self.note_units(&order);
    }

    fn note_units(&mut self, order: &ImportedOrder) {
        self.reserved += order.reserved.values().sum::<i64>();
        self.sold += order.sold.values().sum::<i64>();
        for (place, units) in known(&order.reserved).chain(known(&order.sold)) {
            *self.kept.entry(place).or_default() += units;
        }
        for (&(sku, warehouse), units) in &order.sold {
            if warehouse == UNKNOWN_WAREHOUSE {
                *self.sold_before.entry(sku).or_default() += units;
            }
        }
    }

    /// After all orders: what they have not kept goes back on sale.
    pub(crate) fn note_stock(&mut self, rows: Vec<OldStock>) {
        for row in rows {
            let place = (row.sku, row.warehouse);
            let (Some(sku), Some(warehouse)) =
                (Sku::from_db(row.sku), WarehouseId::new(row.warehouse))
            else {
                let (sku, warehouse) = place;
                self.refuse(format!(
                    "stock and reservations have SKU {sku} in warehouse {warehouse}"
                ));
                continue;
            };
            let returned = row.reserved - self.kept.get(&place).copied().unwrap_or_default();
            self.returned += returned;
            let on_sale = row.count + returned;
            self.stock.push(ImportedStock {
                sku,
                warehouse,
                on_sale: on_sale.max(0),
                deficit: (-on_sale).max(0),
            });
        }
    }

    fn refuse(&mut self, why: String) {
        if self.refused.len() < LISTED {
            self.refused.push(why);
        } else {
            self.more_refused += 1;
        }
    }

    /// What cannot be taken over.
    pub(crate) fn refused(&self) -> Vec<String> {
        let more = (self.more_refused > 0).then(|| format!("and {} more", self.more_refused));
        self.refused.iter().cloned().chain(more).collect()
    }

    /// All that was ever received, as one delivery: what is on sale, reserved and sold.
    pub(crate) fn delivery(&self, id: &str) -> Delivery {
        let stock = self.stock.iter().map(|row| {
            let place = (row.sku.db(), row.warehouse.get());
            let kept = self.kept.get(&place).copied().unwrap_or_default();
            (row.sku, row.warehouse, row.on_sale + kept)
        });
        let before = self.sold_before.iter().filter_map(|(&sku, &units)| {
            Some((Sku::from_db(sku)?, WarehouseId::BEFORE_IMPORT, units))
        });
        Delivery::imported(id, stock.chain(before))
    }

    fn deficits(&self) -> impl Iterator<Item = &ImportedStock> {
        self.stock.iter().filter(|row| row.deficit > 0)
    }
}

/// A plan and the id of its delivery.
struct Report<'a>(&'a Plan, &'a str);

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.write_orders(f)?;
        self.0.write_stock(f, self.1)
    }
}

impl Plan {
    /// What becomes of what; `delivery` brings all units.
    pub(crate) fn report(&self, delivery: &str) -> String {
        Report(self, delivery).to_string()
    }

    fn write_orders(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let orders: u64 = self.orders.values().sum();
        writeln!(
            f,
            "orders: {orders} with {} lines, the highest number given is {}",
            self.lines, self.highest
        )?;
        for ((was, becomes), orders) in &self.orders {
            let told = was != becomes;
            let why = if told { ", decided by the import" } else { "" };
            writeln!(f, "  {was} -> {becomes}: {orders}{why}")?;
        }
        for (number, what) in [
            (
                self.left_out,
                "lines of SKU 0 or without units are left out",
            ),
            (self.without_lines, "orders have no line"),
            (
                self.stray_lines.unsigned_abs(),
                "lines of orders that are not there are left out",
            ),
        ] {
            if number > 0 {
                writeln!(f, "  {number} {what}")?;
            }
        }
        writeln!(
            f,
            "events: {} count as sent, {} are told",
            self.steps - self.decided,
            self.decided
        )
    }

    fn write_stock(&self, f: &mut fmt::Formatter<'_>, delivery: &str) -> fmt::Result {
        let on_sale: i64 = self.stock.iter().map(|row| row.on_sale).sum();
        let before: i64 = self.sold_before.values().sum();
        let deficit: i64 = self.deficits().map(|row| row.deficit).sum();
        writeln!(
            f,
            "stock: its count is read as units on sale, what is reserved being taken out already"
        )?;
        writeln!(
            f,
            "  on sale: {on_sale} units in {} rows, {} of them returned from reservations ({} orders that keep less than they held)",
            self.stock.len(),
            self.returned,
            self.releasing
        )?;
        writeln!(f, "  reserved: {} units", self.reserved)?;
        writeln!(
            f,
            "  sold: {} units, {before} of them from an unknown warehouse, booked on {UNKNOWN_WAREHOUSE}, never on sale",
            self.sold
        )?;
        write!(
            f,
            "  received: {} units, by the delivery {delivery}",
            on_sale + self.reserved + self.sold
        )?;
        let rows = self.deficits().count();
        if rows > 0 {
            write!(
                f,
                "\n  {rows} rows below 0 become 0, {deficit} units were sold that were not there (kept in loms.import_deficit):"
            )?;
        }
        for row in self.deficits().take(LISTED) {
            write!(
                f,
                "\n    SKU {} in warehouse {}: {} units",
                row.sku.get(),
                row.warehouse.get(),
                row.deficit
            )?;
        }
        if rows > LISTED {
            write!(f, "\n    and {} more", rows - LISTED)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::Status;

    #[test]
    fn a_deficit_is_what_is_left_of_it_after_returns() {
        let mut plan = Plan::default();
        let failed = OldOrder {
            id: 1,
            user: 1,
            status: Status::Failed.as_str().into(),
            created_at: None,
            updated_at: None,
            items: BTreeMap::from([(7, 5)]),
            reserved: BTreeMap::from([((7, 1), 3)]),
        };
        plan.note_order(&failed);
        let row = |sku, count, reserved| OldStock {
            sku,
            warehouse: 1,
            count,
            reserved,
        };
        plan.note_stock(vec![row(7, -5, 3), row(8, -1, 4), row(9, 2, 0)]);
        let stock: Vec<_> = plan
            .stock
            .iter()
            .map(|row| (row.sku.get(), row.on_sale, row.deficit))
            .collect();
        assert_eq!(stock, [(7, 0, 2), (8, 3, 0), (9, 2, 0)]);
        let report = plan.report("import:shop");
        assert!(report.contains("SKU 7 in warehouse 1: 2 units"), "{report}");
        assert!(report.contains("received: 5 units"), "{report}");
        // what nothing was ever received of is no line of a delivery
        assert_eq!(plan.delivery("import:shop").lines().count(), 2);
    }

    #[test]
    fn places_that_cannot_be_are_refused() {
        let mut plan = Plan::default();
        for (sku, warehouse) in [(7, 0), (0, 1), (1 << 32, 1), (7, UNKNOWN_WAREHOUSE)] {
            plan.note_stock(vec![OldStock {
                sku,
                warehouse,
                count: 1,
                reserved: 0,
            }]);
        }
        assert_eq!(plan.refused().len(), 4, "{:?}", plan.refused());
        assert!(plan.stock.is_empty());
    }
}
