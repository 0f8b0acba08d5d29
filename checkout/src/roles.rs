//! Who may call which RPC, where the config gives roles.

use platform::roles::{Methods, Role};

/// Every RPC of the service and the roles that may call it. A method that is missing here is
/// refused.
pub const METHODS: Methods = &[
    ("/cart.Cart/AddToCart", &[Role::Gateway]),
    ("/cart.Cart/DeleteFromCart", &[Role::Gateway]),
    ("/cart.Cart/ListCart", &[Role::Gateway]),
    ("/cart.Cart/Purchase", &[Role::Gateway]),
];
