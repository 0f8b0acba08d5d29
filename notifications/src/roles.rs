//! Who may call which RPC, where the config gives roles.

use platform::roles::{Methods, Role};

/// Every RPC of the service; one that is missing here is for nobody.
pub const METHODS: Methods = &[(
    "/notifications.Notifications/GetHistoryWithPeriod",
    Role::ANY,
)];
