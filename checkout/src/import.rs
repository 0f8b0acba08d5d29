//! `checkout import`: the carts of the system before.

use std::{collections::HashSet, fmt};

use anyhow::Context as _;
use fail::fail_point;
use platform::{
    import::{self, Import, ImportArgs, Moment, Original, Source, Table},
    pg::Db,
};

use crate::{
    app::{MIGRATOR, SERVICE},
    cart::{Quantity, Sku, UserId},
    config::Config,
    store::import as store,
};

/// The tables of the system before.
pub static ORIGINAL: Original = Original {
    service: SERVICE,
    tables: &[
        Table {
            name: "cart",
            columns: &["id", "user_id"],
            optional: &["created_at", "updated_at"],
            key: "id",
        },
        Table {
            name: "cart_item",
            columns: &["cart_id", "sku", "count"],
            optional: &[],
            key: "cart_id",
        },
    ],
};

/// Takes the carts of the system before over, or says what would become of them. Returns what to
/// print.
///
/// # Errors
/// Everything that an operator must settle first, on one line; a database that is away.
pub async fn import(config: &Config, args: &ImportArgs) -> anyhow::Result<String> {
    #[cfg(feature = "failpoints")]
    let _crash_points = fail::FailScenario::setup();
    let schema = (&MIGRATOR, &[][..]);
    import::run(args, &config.postgres, &ORIGINAL, schema, Carts::default()).await
}

/// A cart with its units by SKU, as the system before has it, or as it is taken over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CartRow {
    /// Its number.
    pub id: i64,
    /// Whose it is.
    pub user: i64,
    /// SKU and units, by SKU.
    pub lines: Vec<(i64, i64)>,
}

/// What was made of lines that no cart of ours can hold.
#[derive(Debug, Default, PartialEq, Eq)]
struct Changed {
    /// Of SKU 0 or without units.
    left_out: u64,
    /// Of more units than a line may have.
    cut: u64,
}

impl CartRow {
    /// The cart without the lines that a cart of ours cannot hold. `None`: the user is below 1.
    fn take_over(&self) -> Option<(CartRow, Changed)> {
        UserId::new(self.user)?;
        let mut changed = Changed::default();
        let lines = self.lines.iter().filter_map(|&(sku, units)| {
            if u32::try_from(sku).ok().and_then(Sku::new).is_none() || units < 1 {
                changed.left_out += 1;
                return None;
            }
            let most = i64::from(Quantity::MAX);
            changed.cut += u64::from(units > most);
            Some((sku, units.min(most)))
        });
        let lines = lines.collect();
        let (id, user) = (self.id, self.user);
        Some((CartRow { id, user, lines }, changed))
    }
}

#[derive(Default)]
struct Carts {
    carts: u64,
    empty: u64,
    lines: u64,
    units: i64,
    changed: Changed,
    nobodys: u64,
    stray_lines: i64,
    /// Owners so far.
    users: HashSet<i64>,
    twice: Vec<i64>,
    highest: i64,
}

impl fmt::Display for Carts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "carts: {} with {} lines of {} units, {} of them empty; the highest number given is {}",
            self.carts, self.lines, self.units, self.empty, self.highest
        )?;
        for (number, what) in [
            (self.nobodys, "carts of users below 1 are left out"),
            (
                self.changed.left_out,
                "lines of SKU 0 or without units are left out",
            ),
            (
                self.changed.cut,
                "lines of more than 65535 units have 65535",
            ),
            (
                self.stray_lines.unsigned_abs(),
                "lines of carts that are not there are left out",
            ),
        ] {
            if number > 0 {
                write!(f, "\n  {number} {what}")?;
            }
        }
        Ok(())
    }
}

impl Import for Carts {
    type Batch = Vec<CartRow>;

    async fn read(
        &self,
        source: &mut Source,
        after: Option<i64>,
    ) -> anyhow::Result<Option<Vec<CartRow>>> {
        let batch = store::read_carts(source, after).await;
        let batch = batch.context("reading carts")?;
        Ok((!batch.is_empty()).then_some(batch))
    }

    fn last(&self, batch: &Vec<CartRow>) -> i64 {
        batch.last().map_or(i64::MAX, |cart| cart.id)
    }

    fn note(&mut self, batch: &Vec<CartRow>) {
        for old in batch {
            let Some((cart, changed)) = old.take_over() else {
                self.nobodys += 1;
                continue;
            };
            if !self.users.insert(cart.user) {
                self.twice.push(cart.user);
            }
            self.carts += 1;
            self.empty += u64::from(cart.lines.is_empty());
            self.lines += cart.lines.len() as u64;
            self.units += cart.lines.iter().map(|(_, units)| units).sum::<i64>();
            self.changed.left_out += changed.left_out;
            self.changed.cut += changed.cut;
        }
    }

    async fn read_rest(&mut self, source: &mut Source) -> anyhow::Result<()> {
        self.highest = source.highest("cart", "id").await?;
        self.stray_lines = store::count_stray_lines(source).await?;
        Ok(())
    }

    fn refused(&self) -> Vec<String> {
        let users = self.twice.iter().take(20);
        users
            .map(|user| format!("user {user} has more than one cart"))
            .collect()
    }

    fn report(&self) -> String {
        self.to_string()
    }

    async fn begin(&self, db: &mut Db) -> anyhow::Result<Option<String>> {
        if store::has_carts(db).await? {
            return Ok(Some("checkout.cart has rows".to_owned()));
        }
        store::raise_cart_numbers(db, self.highest).await?;
        Ok(None)
    }

    async fn write(&self, db: &mut Db, batch: &Vec<CartRow>) -> anyhow::Result<()> {
        let carts = batch.iter().filter_map(CartRow::take_over);
        let carts: Vec<CartRow> = carts.map(|(cart, _)| cart).collect();
        Ok(store::insert_carts(db, &carts).await?)
    }

    async fn finish(&self, db: &mut Db) -> anyhow::Result<()> {
        Ok(store::analyze(db).await?)
    }

    fn pass(&self, moment: Moment) {
        match moment {
            Moment::Writing => fail_point!("slice-importing", |_| std::process::abort()),
            Moment::Written => fail_point!("slice-imported", |_| std::process::abort()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_cart_can_hold_is_left_out_or_cut() {
        let old = CartRow {
            id: 1,
            user: 7,
            lines: vec![(0, 1), (3, 0), (4, -1), (5, 2), (6, 70_000), (1 << 32, 1)],
        };
        let (cart, changed) = old.take_over().unwrap();
        assert_eq!(cart.lines, [(5, 2), (6, 65_535)]);
        let expected = Changed {
            left_out: 4,
            cut: 1,
        };
        assert_eq!(changed, expected);
        assert_eq!(CartRow { user: 0, ..old }.take_over(), None);
    }
}
