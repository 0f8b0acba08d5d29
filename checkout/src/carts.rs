//! What a user does with the cart: add, delete, list. Reading never writes; what writes runs to its end in a task of its
//! own, under the lock of the cart's row.

use std::{collections::HashMap, sync::Arc};

use futures::{StreamExt as _, stream::FuturesUnordered};
use platform::{
    grpc::Deadline,
    pg::{self, Db, Pool},
    tasks::Tasks,
};

use crate::{
    cart::{self, Line, Refusal, Sku, UserId},
    clients::{
        loms::Loms,
        products::{Product, Products},
        turn::Turn,
    },
    error::Error,
    store,
};

/// The use cases of the cart; clones share everything.
#[derive(Clone)]
pub struct Carts {
    pool: Pool,
    loms: Loms,
    products: Products,
    tasks: Tasks,
}

/// A cart with names and prices as they are now, in the order of SKU.
pub struct Contents {
    /// The lines.
    pub lines: Vec<(Line, Arc<Product>)>,
    /// The sum of units times price.
    pub total: u32,
}

impl Carts {
    /// Carts are in `pool`; `tasks` carries the writes.
    pub fn new(pool: Pool, loms: Loms, products: Products, tasks: Tasks) -> Self {
        Self {
            pool,
            loms,
            products,
            tasks,
        }
    }

    /// Adds units. The stock is read first and the network left alone after that: what another call of the user added
    /// meanwhile is counted under the lock, what other users took is LOMS's to refuse when the order is placed.
    ///
    /// # Errors
    /// INSUFFICIENT_STOCK, CART_FULL; LOMS or the database is away or late.
    pub async fn add(&self, user: UserId, asked: Line, deadline: Deadline) -> Result<(), Error> {
        let on_sale = self.loms.units_on_sale(asked.sku, deadline).await?;
        let pool = self.pool.clone();
        self.tasks
            .run("add to cart", async move {
                let write = async |db: &mut Db| add(db, user, asked, on_sale, deadline).await;
                pool.with_row(user.get(), write).await
            })
            .await?
    }

    /// Takes units out; more than there are removes the line.
    ///
    /// # Errors
    /// The SKU is not in the cart; the database is away or late.
    pub async fn delete(&self, user: UserId, taken: Line, deadline: Deadline) -> Result<(), Error> {
        let pool = self.pool.clone();
        self.tasks
            .run("delete from cart", async move {
                let write = async |db: &mut Db| delete(db, user, taken, deadline).await;
                pool.with_row(user.get(), write).await
            })
            .await?
    }

    /// The cart with names and prices.
    ///
    /// # Errors
    /// Products that ProductService does not know, all of them named; it is away or late; a total that does not fit.
    pub async fn list(&self, user: UserId, deadline: Deadline) -> Result<Contents, Error> {
        let read = async |db: &mut Db| store::carts::list_lines(db, user).await;
        let lines = self.pool.repeatable(read).await?;
        let products = self.products_of(&lines, deadline).await?;
        let lines: Vec<_> = lines
            .into_iter()
            .filter_map(|line| {
                products
                    .get(&line.sku)
                    .map(|product| (line, product.clone()))
            })
            .collect();
        let prices = lines
            .iter()
            .map(|(line, product)| (line.quantity, product.price));
        let total = cart::total(prices).ok_or(Error::TotalTooLarge)?;
        Ok(Contents { lines, total })
    }

    async fn products_of(
        &self,
        lines: &[Line],
        deadline: Deadline,
    ) -> Result<HashMap<Sku, Arc<Product>>, Error> {
        let turn = Turn::default();
        let turn = &turn;
        let look_up = |line: &Line| {
            let sku = line.sku;
            async move { (sku, self.products.get(sku, turn, deadline).await) }
        };
        let mut answers: FuturesUnordered<_> = lines.iter().map(look_up).collect();
        let (mut products, mut unknown) = (HashMap::new(), Vec::new());
        while let Some((sku, answer)) = answers.next().await {
            match answer {
                Ok(product) => {
                    products.insert(sku, product);
                }
                Err(Error::UnknownProducts { skus }) => unknown.extend(skus),
                Err(error) => return Err(error),
            }
        }
        if unknown.is_empty() {
            return Ok(products);
        }
        unknown.sort_unstable();
        Err(Error::UnknownProducts { skus: unknown })
    }
}

async fn add(
    db: &mut Db,
    user: UserId,
    asked: Line,
    on_sale: u64,
    deadline: Deadline,
) -> Result<(), Error> {
    Error::unless_in_time(deadline)?;
    let mut tx = db.begin().await?;
    let cart_id = lock_or_create(&mut tx, user).await?;
    // the lock may have been the longest wait of all; from here on it is written whole
    Error::unless_in_time(deadline)?;
    let holding = store::carts::read_holding(&mut tx, cart_id, asked.sku).await?;
    let quantity = holding
        .add(asked.quantity, on_sale)
        .map_err(|refusal| match refusal {
            Refusal::CartFull => Error::CartFull { sku: asked.sku },
            Refusal::InsufficientStock => Error::InsufficientStock {
                sku: asked.sku,
                asked: asked.quantity.get(),
                in_cart: holding.in_cart,
                available: on_sale,
            },
        })?;
    let line = Line {
        sku: asked.sku,
        quantity,
    };
    store::carts::put_line(&mut tx, cart_id, line).await?;
    tx.commit().await?;
    Ok(())
}

async fn lock_or_create(conn: &mut Db, user: UserId) -> Result<i64, Error> {
    if let Some(cart_id) = store::carts::lock_cart(conn, user).await? {
        return Ok(cart_id);
    }
    store::carts::create_cart(conn, user).await?;
    // it is there now, made here or by a call that came at the same time, and carts are never deleted
    Ok(store::carts::lock_cart(conn, user)
        .await?
        .ok_or_else(|| pg::Error::invariant("a cart that was just made is not there"))?)
}

async fn delete(db: &mut Db, user: UserId, taken: Line, deadline: Deadline) -> Result<(), Error> {
    let missing = || Error::NotInCart { sku: taken.sku };
    Error::unless_in_time(deadline)?;
    let mut tx = db.begin().await?;
    let cart_id = store::carts::lock_cart(&mut tx, user)
        .await?
        .ok_or_else(missing)?;
    Error::unless_in_time(deadline)?;
    let held = store::carts::read_units(&mut tx, cart_id, taken.sku)
        .await?
        .ok_or_else(missing)?;
    match held.take(taken.quantity) {
        Some(quantity) => {
            let line = Line {
                sku: taken.sku,
                quantity,
            };
            store::carts::put_line(&mut tx, cart_id, line).await?;
        }
        None => store::carts::delete_line(&mut tx, cart_id, taken.sku).await?,
    }
    tx.commit().await?;
    Ok(())
}
