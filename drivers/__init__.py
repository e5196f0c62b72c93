"""Hardware behind small interfaces (`drivers.interfaces`). Drivers pass bytes and pictures, and know no EMV."""
