"""How clients reach a coordinator: what every frontend shares, and one folder for each protocol."""
