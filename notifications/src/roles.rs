//! Who may call which RPC, where the config gives roles.

use platform::roles::{Methods, Role};

/// Every RPC of the service and the roles that may call it. A method that is missing here is
/// refused.
pub const METHODS: Methods = &[(
    "/notifications.Notifications/GetHistoryWithPeriod",
    Role::ANY,
)];
