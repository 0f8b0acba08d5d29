//! Which warehouse gives what. Pure and deterministic: a line comes from the warehouse that can fill it with the least
//! left over, else from the fullest first; ties go to the lower id. An order gets every unit, or none.

use std::collections::BTreeMap;

use crate::order::{Lines, Sku, WarehouseId};

/// Units that one warehouse gives to one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Allocation {
    pub(crate) sku: Sku,
    pub(crate) warehouse: WarehouseId,
    pub(crate) units: u64,
}

/// A line that cannot be filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shortage {
    pub(crate) sku: Sku,
    pub(crate) requested: u64,
    /// On sale over all warehouses.
    pub(crate) available: u64,
}

/// What is on sale, as locked by the transaction that places a batch; orders take from it one after another.
#[derive(Clone, Debug, Default)]
pub(crate) struct Shelves(BTreeMap<Sku, Vec<(WarehouseId, u64)>>);

impl Shelves {
    pub(crate) fn put(&mut self, sku: Sku, warehouse: WarehouseId, units: u64) {
        self.0.entry(sku).or_default().push((warehouse, units));
    }

    /// Takes every line of an order, or nothing and says what is short.
    pub(crate) fn allocate(&mut self, lines: &Lines) -> Result<Vec<Allocation>, Vec<Shortage>> {
        let shortages: Vec<_> = lines
            .iter()
            .filter_map(|(sku, quantity)| {
                let (requested, available) = (u64::from(quantity.get()), self.available(sku));
                (available < requested).then_some(Shortage {
                    sku,
                    requested,
                    available,
                })
            })
            .collect();
        if !shortages.is_empty() {
            return Err(shortages);
        }
        Ok(lines
            .iter()
            .flat_map(|(sku, quantity)| self.take(sku, u64::from(quantity.get())))
            .collect())
    }

    fn available(&self, sku: Sku) -> u64 {
        self.0
            .get(&sku)
            .map_or(0, |shelf| shelf.iter().map(|&(_, units)| units).sum())
    }

    fn take(&mut self, sku: Sku, mut wanted: u64) -> Vec<Allocation> {
        let Some(shelf) = self.0.get_mut(&sku) else {
            return Vec::new();
        };
        let whole = shelf
            .iter()
            .filter(|&&(_, units)| units >= wanted)
            .min_by_key(|&&(id, units)| (units, id))
            .copied();
        if whole.is_none() {
            shelf.sort_by_key(|&(id, units)| (std::cmp::Reverse(units), id));
        }
        let mut taken = Vec::new();
        for (warehouse, units) in shelf.iter_mut() {
            if whole.is_some_and(|(best, _)| best != *warehouse) {
                continue;
            }
            let part = wanted.min(*units);
            if part > 0 {
                *units -= part;
                wanted -= part;
                taken.push(Allocation {
                    sku,
                    warehouse: *warehouse,
                    units: part,
                });
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use platform::error::Fields;
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn shelves(stock: &[(u32, i64, u64)]) -> Shelves {
        let mut shelves = Shelves::default();
        for &(sku, warehouse, units) in stock {
            shelves.put(
                Sku::new(sku).unwrap(),
                WarehouseId::new(warehouse).unwrap(),
                units,
            );
        }
        shelves
    }

    fn lines(items: &[(u32, u32)]) -> Lines {
        Lines::parse(items, &mut Fields::new()).unwrap()
    }

    fn taken(stock: &[(u32, i64, u64)], items: &[(u32, u32)]) -> Vec<(u32, i64, u64)> {
        let taken = shelves(stock).allocate(&lines(items)).unwrap();
        taken
            .into_iter()
            .map(|a| (a.sku.get(), a.warehouse.get(), a.units))
            .collect()
    }

    #[test]
    fn the_tightest_warehouse_that_fills_the_line() {
        assert_eq!(
            taken(&[(1, 1, 9), (1, 2, 5), (1, 3, 4)], &[(1, 5)]),
            [(1, 2, 5)]
        );
        assert_eq!(taken(&[(1, 2, 7), (1, 1, 7)], &[(1, 5)]), [(1, 1, 5)]);
    }

    #[test]
    fn else_the_fullest_first() {
        assert_eq!(
            taken(&[(1, 1, 2), (1, 2, 5), (1, 3, 5)], &[(1, 11)]),
            [(1, 2, 5), (1, 3, 5), (1, 1, 1)]
        );
    }

    #[test]
    fn one_short_line_takes_nothing() {
        let mut shelves = shelves(&[(1, 1, 5), (2, 1, 1)]);
        let short = shelves
            .allocate(&lines(&[(1, 5), (2, 2), (3, 1)]))
            .unwrap_err();
        let short: Vec<_> = short
            .into_iter()
            .map(|s| (s.sku.get(), s.requested, s.available))
            .collect();
        assert_eq!(short, [(2, 2, 1), (3, 1, 0)]);
        assert_eq!(shelves.allocate(&lines(&[(1, 5)])).unwrap().len(), 1);
    }

    proptest! {
        #[test]
        fn units_are_conserved_and_nobody_gets_a_part(
            stock in vec((1_u32..6, 1_i64..5, 0_u64..40), 0..20),
            orders in vec(vec((1_u32..6, 1_u32..30), 1..6), 1..12),
        ) {
            let stock: BTreeMap<_, _> = stock.into_iter().map(|(sku, w, units)| ((sku, w), units)).collect();
            let flat: Vec<_> = stock.iter().map(|(&(sku, w), &units)| (sku, w, units)).collect();
            let mut shelves = shelves(&flat);
            let mut left = stock.clone();
            for order in orders {
                let lines = lines(&order);
                let total = |left: &BTreeMap<(u32, i64), u64>, sku: Sku| -> u64 {
                    left.iter().filter(|((s, _), _)| *s == sku.get()).map(|(_, units)| units).sum()
                };
                match shelves.allocate(&lines) {
                    Ok(parts) => {
                        for part in &parts {
                            let shelf = left.get_mut(&(part.sku.get(), part.warehouse.get())).unwrap();
                            prop_assert!(*shelf >= part.units, "took more than there is");
                            *shelf -= part.units;
                        }
                        for (sku, quantity) in lines.iter() {
                            let got: u64 = parts.iter().filter(|p| p.sku == sku).map(|p| p.units).sum();
                            prop_assert_eq!(got, u64::from(quantity.get()));
                        }
                    }
                    Err(shortages) => {
                        prop_assert!(!shortages.is_empty());
                        for short in shortages {
                            prop_assert_eq!(short.available, total(&left, short.sku));
                            prop_assert!(short.available < short.requested);
                        }
                    }
                }
            }
        }
    }
}
