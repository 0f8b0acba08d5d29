//! The model of LOMS that `model` holds it against: what everything comes to, without a database, a clock or a neighbour.

use std::{cmp::Reverse, collections::BTreeMap};

use tonic::Code;

/// Units by (SKU, warehouse).
pub(crate) type Shelves = BTreeMap<(u32, i64), u64>;

#[derive(Default)]
pub(crate) struct Shop {
    pub(crate) shelves: Shelves,
    pub(crate) orders: Vec<Order>,
    /// What each key asked for, and the order it made.
    pub(crate) keys: BTreeMap<u8, (Vec<(u32, u32)>, usize)>,
    deliveries: BTreeMap<u8, Shelves>,
}

#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) lines: BTreeMap<u32, u32>,
    /// Statuses, and who brought them about.
    pub(crate) history: Vec<(&'static str, &'static str)>,
    /// From where its units come, while it has any.
    pub(crate) units: Shelves,
    /// `(SKU, requested, available)`.
    pub(crate) shortages: Vec<(u32, u64, u64)>,
}

/// Why the model refuses: the code, and the reason if there is one.
pub(crate) type Refusal = (Code, &'static str);

fn summed(lines: &[(u32, u32)]) -> BTreeMap<u32, u32> {
    let mut sums = BTreeMap::new();
    for &(sku, units) in lines {
        *sums.entry(sku).or_default() += units;
    }
    sums
}

impl Shop {
    /// The number of the order that answers.
    pub(crate) fn create(
        &mut self,
        lines: &[(u32, u32)],
        key: Option<u8>,
    ) -> Result<usize, Refusal> {
        if let Some((asked, index)) = key.and_then(|key| self.keys.get(&key)) {
            return if summed(asked) == summed(lines) {
                Ok(*index)
            } else {
                Err((Code::InvalidArgument, "IDEMPOTENCY_KEY_REUSED"))
            };
        }
        let index = self.orders.len();
        if let Some(key) = key {
            self.keys.insert(key, (lines.to_vec(), index));
        }
        let order = self.place(summed(lines));
        self.orders.push(order);
        Ok(index)
    }

    fn place(&mut self, lines: BTreeMap<u32, u32>) -> Order {
        let on_sale = |sku| self.stocks(sku).iter().map(|(_, units)| units).sum::<u64>();
        let wanted = lines
            .iter()
            .map(|(&sku, &units)| (sku, u64::from(units), on_sale(sku)));
        let shortages: Vec<_> = wanted.filter(|(_, wanted, there)| there < wanted).collect();
        let mut units = Shelves::new();
        if shortages.is_empty() {
            for (&sku, &wanted) in &lines {
                self.take(sku, wanted.into(), &mut units);
            }
        }
        let decided = if shortages.is_empty() {
            "awaiting payment"
        } else {
            "failed"
        };
        Order {
            lines,
            history: vec![("new", "user"), (decided, "user")],
            units,
            shortages,
        }
    }

    /// From the warehouse that fills the line with the least left over, else from the fullest first; ties by number.
    fn take(&mut self, sku: u32, mut wanted: u64, into: &mut Shelves) {
        let mut from = self.stocks(sku);
        from.sort_by_key(|&(warehouse, units)| (units < wanted, units, warehouse));
        if from[0].1 < wanted {
            from.sort_by_key(|&(warehouse, units)| (Reverse(units), warehouse));
        }
        for (warehouse, units) in from {
            let part = units.min(wanted);
            if part > 0 {
                *self.shelves.get_mut(&(sku, warehouse)).expect("a shelf") -= part;
                into.insert((sku, warehouse), part);
                wanted -= part;
            }
        }
    }

    pub(crate) fn stocks(&self, sku: u32) -> Vec<(i64, u64)> {
        let of_sku = self.shelves.range((sku, 0)..(sku + 1, 0));
        let stocks = of_sku.map(|(&(_, warehouse), &units)| (warehouse, units));
        stocks.filter(|(_, units)| *units > 0).collect()
    }

    pub(crate) fn end(
        &mut self,
        index: usize,
        to: &'static str,
        actor: &'static str,
    ) -> Result<(), Refusal> {
        let order = self.orders.get_mut(index).ok_or((Code::NotFound, ""))?;
        match order.status() {
            "awaiting payment" => order.history.push((to, actor)),
            status if status == to => return Ok(()),
            _ => return Err((Code::FailedPrecondition, "")),
        }
        if to == "cancelled" {
            for (shelf, units) in std::mem::take(&mut order.units) {
                *self.shelves.get_mut(&shelf).expect("a shelf") += units;
            }
        }
        Ok(())
    }

    /// Whether it was received before.
    pub(crate) fn receive(&mut self, id: u8, lines: &[(i64, u32, u64)]) -> Result<bool, Refusal> {
        let mut delivered = Shelves::new();
        for &(warehouse, sku, units) in lines {
            *delivered.entry((sku, warehouse)).or_default() += units;
        }
        if let Some(before) = self.deliveries.get(&id) {
            return if *before == delivered {
                Ok(true)
            } else {
                Err((Code::InvalidArgument, "DELIVERY_ID_REUSED"))
            };
        }
        for (&shelf, &units) in &delivered {
            *self.shelves.entry(shelf).or_default() += units;
        }
        self.deliveries.insert(id, delivered);
        Ok(false)
    }

    /// Units of orders in a status, by the order's number and the shelf.
    pub(crate) fn units_in(&self, status: &str) -> Vec<(usize, (u32, i64), u64)> {
        let orders = self
            .orders
            .iter()
            .enumerate()
            .filter(|(_, order)| order.status() == status);
        orders
            .flat_map(|(index, order)| {
                order
                    .units
                    .iter()
                    .map(move |(&shelf, &units)| (index, shelf, units))
            })
            .collect()
    }
}

impl Order {
    pub(crate) fn status(&self) -> &'static str {
        self.history[self.history.len() - 1].0
    }
}
