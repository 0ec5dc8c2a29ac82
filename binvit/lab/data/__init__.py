"""Images: data sets, their files, wrong labels, transforms and minibatches."""
