//! One transaction for many orders: numbers, keys, locks, allocation in order of arrival, writes.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    time::Duration,
};

use platform::pg::{self, Db};

use crate::{
    allocation::{Allocation, Shortage},
    error::Error,
    order::{Event, Lines, OrderId, Sku, Status, UserId},
    store::{
        keys::{self, KeyClaim, KeyOwner},
        placement::{self as store, DecidedOrder},
    },
};

/// An order that somebody wants.
#[derive(Clone, Debug)]
pub(crate) struct NewOrder {
    pub(crate) user: UserId,
    pub(crate) lines: Lines,
    pub(crate) key: Option<IdempotencyKey>,
    /// Trace context of the call, kept with its events.
    pub(crate) traceparent: Option<String>,
}

/// A caller's key, and the hash of what it asked for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct IdempotencyKey {
    pub(crate) key: String,
    pub(crate) body_hash: [u8; 32],
}

/// What became of it.
#[derive(Clone, Debug)]
pub(crate) struct Placed {
    pub(crate) order: OrderId,
    /// For a replayed key the order's present status.
    pub(crate) status: Status,
    pub(crate) shortages: Vec<Shortage>,
}

/// Whether this transaction made the order, and the answer to its caller.
pub(crate) type Answer = (bool, Result<Placed, Error>);

/// Numbers for new orders, drawn in blocks: each draw costs a round trip, a number that stays unused costs nothing.
#[derive(Default)]
pub(crate) struct OrderIds(VecDeque<OrderId>);

impl OrderIds {
    /// A draw that saves a lone caller's round trip, and few enough for numbers to follow time with several replicas.
    const BLOCK: usize = 256;

    async fn take(&mut self, db: &mut Db, count: usize) -> pg::Result<Vec<OrderId>> {
        if self.0.len() < count {
            self.0
                .extend(store::draw_order_ids(db, count.max(Self::BLOCK)).await?);
        }
        Ok(self.0.drain(..count).collect())
    }

    /// After a transaction that failed: what it has drawn may be drawn again when the server has crashed.
    pub(crate) fn forget(&mut self) {
        self.0.clear();
    }
}

/// Places `orders`, and answers in their order. The caller owns the transaction and commits it. `None`: a key was swept
/// while it was claimed, the transaction must be rolled back and may be tried again.
pub(crate) async fn place_batch(
    db: &mut Db,
    orders: &[NewOrder],
    ids: &mut OrderIds,
    payment_timeout: Duration,
) -> pg::Result<Option<Vec<Answer>>> {
    let ids = ids.take(db, orders.len()).await?;
    let Some(owners) = claim_keys(db, orders, &ids).await? else {
        return Ok(None);
    };
    let made = make_orders(db, orders, &ids, &owners, payment_timeout).await?;

    let earlier: Vec<OrderId> = owners
        .iter()
        .filter_map(|owner| owner.order())
        .filter(|order| !made.contains_key(order))
        .collect();
    let (statuses, shortages) = if earlier.is_empty() {
        Default::default()
    } else {
        (
            store::read_statuses(db, &earlier).await?,
            store::read_shortages(db, &earlier).await?,
        )
    };
    let answers = owners
        .into_iter()
        .zip(&ids)
        .map(|(owner, id)| match owner {
            Owner::Reused => (false, Err(Error::KeyReused)),
            Owner::Abandoned => (false, Err(Error::KeyAbandoned)),
            Owner::Order(order) => match made.get(&order) {
                Some(placed) => (order == *id, Ok(placed.clone())),
                None => {
                    let status = statuses.get(&order).copied();
                    let shortages = shortages.get(&order).cloned().unwrap_or_default();
                    (
                        false,
                        status
                            .map(|status| Placed {
                                order,
                                status,
                                shortages,
                            })
                            .ok_or(Error::Broken),
                    )
                }
            },
        })
        .collect();
    Ok(Some(answers))
}

/// Which order answers a request.
#[derive(Clone, Copy)]
enum Owner {
    Order(OrderId),
    /// The key stands for another request.
    Reused,
    /// The key was given up before an order was made for it.
    Abandoned,
}

impl Owner {
    fn order(self) -> Option<OrderId> {
        match self {
            Owner::Order(order) => Some(order),
            Owner::Reused | Owner::Abandoned => None,
        }
    }
}

/// Claims the keys of a batch. Equal keys are folded: the first order of a batch owns, the others answer from it. `None`:
/// a key was taken when it was claimed, and swept when its owner was looked up. To claim it again in this transaction
/// would be out of order, and deadlock with a batch that has it meanwhile and wants one that was won here.
async fn claim_keys(
    db: &mut Db,
    orders: &[NewOrder],
    ids: &[OrderId],
) -> pg::Result<Option<Vec<Owner>>> {
    let mut firsts: HashMap<(UserId, &str), usize> = HashMap::new();
    for (index, order) in orders.iter().enumerate() {
        if let Some(key) = &order.key {
            firsts
                .entry((order.user, key.key.as_str()))
                .or_insert(index);
        }
    }
    let known = claim_first_keys(db, orders, ids, &firsts).await?;
    let owners = orders
        .iter()
        .zip(ids)
        .map(|(order, id)| {
            let Some(key) = &order.key else {
                return Some(Owner::Order(*id));
            };
            let first = *firsts.get(&(order.user, key.key.as_str()))?;
            let owner = known.get(&ids[first])?;
            Some(if owner.is_tombstone() {
                Owner::Abandoned
            } else if owner.body_hash == key.body_hash {
                Owner::Order(owner.order)
            } else {
                Owner::Reused
            })
        })
        .collect();
    Ok(owners)
}

/// Whose the keys are and what they stand for, by the order that each was claimed for; without those that have been
/// swept just now.
async fn claim_first_keys(
    db: &mut Db,
    orders: &[NewOrder],
    ids: &[OrderId],
    firsts: &HashMap<(UserId, &str), usize>,
) -> pg::Result<HashMap<OrderId, KeyOwner>> {
    if firsts.is_empty() {
        return Ok(HashMap::new());
    }
    let claims = firsts.iter().filter_map(|(&(user, key), &index)| {
        let body_hash = &orders[index].key.as_ref()?.body_hash;
        Some(KeyClaim {
            user,
            key,
            body_hash,
            order: ids[index],
        })
    });
    let claims: Vec<_> = claims.collect();
    let won = keys::claim_keys(db, &claims).await?;
    let (own, lost): (Vec<_>, Vec<_>) = claims
        .into_iter()
        .partition(|claim| won.contains(&claim.order));
    let own = own.into_iter().map(|claim| {
        let owner = KeyOwner {
            body_hash: claim.body_hash.to_vec(),
            order: claim.order,
        };
        (claim.order, owner)
    });
    let mut known: HashMap<OrderId, KeyOwner> = own.collect();
    if !lost.is_empty() {
        let names: Vec<_> = lost.iter().map(|claim| (claim.user, claim.key)).collect();
        let mut owners = keys::read_key_owners(db, &names).await?;
        known.extend(lost.iter().filter_map(|claim| {
            let owner = owners.remove(&(claim.user, claim.key.to_owned()))?;
            Some((claim.order, owner))
        }));
    }
    Ok(known)
}

/// Decides and writes the orders that own themselves.
async fn make_orders(
    db: &mut Db,
    orders: &[NewOrder],
    ids: &[OrderId],
    owners: &[Owner],
    payment_timeout: Duration,
) -> pg::Result<HashMap<OrderId, Placed>> {
    let own: Vec<(OrderId, &NewOrder)> = ids
        .iter()
        .zip(orders)
        .zip(owners)
        .filter(|((id, _), owner)| owner.order() == Some(**id))
        .map(|((id, order), _)| (*id, order))
        .collect();
    if own.is_empty() {
        return Ok(HashMap::new());
    }
    let skus: BTreeSet<Sku> = own
        .iter()
        .flat_map(|(_, order)| order.lines.iter().map(|(sku, _)| sku))
        .collect();
    let mut shelves = store::lock_shelves(db, &skus.into_iter().collect::<Vec<_>>()).await?;

    let (mut decided, mut taken, mut short) =
        (Vec::new(), Vec::<(OrderId, Allocation)>::new(), Vec::new());
    let mut made = HashMap::new();
    for (id, order) in own {
        let (event, shortages) = match shelves.allocate(&order.lines) {
            Ok(parts) => {
                taken.extend(parts.into_iter().map(|part| (id, part)));
                (Event::Reserve, Vec::new())
            }
            Err(shortages) => {
                short.extend(shortages.iter().map(|shortage| (id, *shortage)));
                (Event::Reject, shortages)
            }
        };
        // a new order may be reserved or rejected: the table of statuses has both
        let status = Status::New.apply(event).map_err(|_| {
            pg::Error::invariant("a new order can be neither reserved nor rejected")
        })?;
        let traceparent = order.traceparent.as_deref();
        decided.push(DecidedOrder {
            id,
            user: order.user,
            status,
            lines: &order.lines,
            traceparent,
        });
        made.insert(
            id,
            Placed {
                order: id,
                status,
                shortages,
            },
        );
    }
    store::insert_orders(db, &decided, &taken, payment_timeout).await?;
    if !short.is_empty() {
        store::insert_shortages(db, &short).await?;
    }
    Ok(made)
}
