//! Origins: the authorities that resolve references and serve bytes.
